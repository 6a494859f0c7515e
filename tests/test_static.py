"""Shipped kernels compile to what was recorded, and every size and architecture has a tile."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from benchmarks.machine_code import offline, static
from titans_kernels.kernels import tiles
from titans_kernels.kernels.tiles import ARCHITECTURES, Blocks, Schedule, Tile, tile, using

ROOT = Path(__file__).parents[1]
# Where `make test` puts another Triton. First on the path, it takes the installed one's place.
SECOND = os.environ.get("SECOND_TRITON", f"{sys.prefix}/triton-3.6.0")


# `make test` compiles with every Triton, and for NVIDIA and AMD; `make static` and `make test-all`
# for every architecture and head dimension, which takes many minutes.
ESSENTIAL = {
    "sm_90, D 64": ("", "sm_90", (64,)),
    "gfx942, D 64": ("", "gfx942", (64,)),
    "second, sm_80, D 64": (SECOND, "sm_80", (64,)),
}
ALL = {
    f"{'second, ' if path else ''}{arch}": (path, arch, static.HEAD_DIMS)
    for path, arch in product(("", SECOND), ARCHITECTURES)
}


# A process each: they do not interpret, some have another Triton, and two workers share them.
@pytest.mark.slow
@pytest.mark.parametrize(
    "path, arch, head_dims",
    [pytest.param(*row, id=name) for name, row in ESSENTIAL.items()]
    + [pytest.param(*row, id=name, marks=pytest.mark.wide) for name, row in ALL.items()],
)
def test_shipped_kernels(path, arch, head_dims, tmp_path):
    if path and not Path(path, "triton").is_dir():
        pytest.skip(f"no {path}; `make test` installs it")
    out = _checked(path, tmp_path, "--arch", arch, "--head-dim", *map(str, head_dims))
    assert all(f"\n{kernel} " in out for kernel in static.KERNELS)
    assert out.startswith("Triton 3.6") or not path


@pytest.mark.slow
@pytest.mark.wide
def test_kernels_of_deeper_memories(tmp_path):
    depths = map(str, static.DEPTHS)
    out = _checked("", tmp_path, "--arch", "sm_90", "--head-dim", "64", "--depth", *depths)
    assert out.count("\nscan_backward ") == 1 + len(static.DEPTHS)


def _checked(path, tmp_path, *options):
    """What the check prints, of the Triton in `path`."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)} | ({"PYTHONPATH": path} if path else {})
    command = [sys.executable, "-m", "benchmarks.machine_code.static", "--check", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("version, stages", [("3.5.1", 1), ("3.7.2", 1), ("3.8.0", 2)])
def test_nothing_is_pipelined_where_triton_leaves_out_the_fence(monkeypatch, version, stages):
    monkeypatch.setattr(triton, "__version__", version)
    tiles._fences.cache_clear()
    try:
        size = tile(64, 256, torch.bfloat16, "sm_90")
        other = tile(64, 256, torch.bfloat16, "sm_100")
    finally:
        tiles._fences.cache_clear()
    assert (size.recall.stages, other.recall.stages) == (stages, 2)


def test_ceilings_are_recorded():
    """Of the versions that are compiled with in tests, those of every kernel and no other."""
    gates = [kernel for kernel in static.KERNELS if kernel.startswith("coefficients")]
    wide = [kernel for kernel in static.KERNELS if kernel not in gates]
    wanted = {
        f"{kernel}, {arch}"
        for arch, D in product(ARCHITECTURES, static.HEAD_DIMS)
        for kernel in (*(f"{kernel}, D {D}" for kernel in wide), f"scan, D {D}, chunk 64")
    }
    wanted |= {
        f"{kernel}, block {tile(D, 4 * D, torch.bfloat16, arch, 16, backward).block}, {arch}"
        for arch, D in product(ARCHITECTURES, static.HEAD_DIMS)
        for kernel in gates
        for backward in [kernel != "coefficients"]
    }
    wanted |= {  # where training takes a tile of its own
        f"{kernel.format(D)}, block 64, {arch}"
        for arch, D in [("sm_90", 128)]
        for kernel in ("scan, D {}, chunk 64", "scan, D {}", "retrieve, D {}")
    }
    deeper = {
        f"{kernel}, D 64, depth {depth}, sm_90" for kernel, depth in product(wide, static.DEPTHS)
    }
    assert wanted == static.recorded()["3.6"].keys()
    assert wanted | deeper == static.recorded()["3.9"].keys()


# -------------------------------------------------------------------------------- the check itself


TOKENS = static.T * static.H
CONSTANTS = {"D": "64", "BD": "64", "BT": "64", "BH": "64", "BQ": "64"}  # retrieve in training


def _report(**changes):
    report = offline.Report(
        kernel="retrieve_kernel",
        arch="sm_90",
        num_warps=8,
        num_stages=2,
        constants=CONSTANTS,
        registers=214,
        stack=0,
        spills=0,
        shared=126_976,
        tensor_memory=0,
        traps=0,
        instructions=2184,
        tensor_core={"HGMMA": 52},
        loads={4: 4, 8: 20, 16: 40},
        stores={16: 2},
        executed={"product": 20 * TOKENS, "integer": 580 * TOKENS},
        flop=1e10,
        needed=1e10,
    )
    return dataclasses.replace(report, **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"registers": 216}, None),
        ({"registers": 217}, "224 registers, recorded 216"),
        ({"stack": 512}, None),
        ({"stack": 513}, "513 bytes of stack, at most 512"),
        ({"constants": CONSTANTS | {"D": "256"}}, None),
        ({"executed": {"integer": 400 * TOKENS, "spill": 200 * TOKENS}}, None),
        (
            {"executed": {"integer": 400 * TOKENS, "spill": 200 * TOKENS + 1}},
            "601 instructions a token, recorded 600",
        ),
        ({"flop": 1.05e10}, None),
        ({"flop": 1.06e10}, "products are computed 1.06 times"),
        ({"flop": 1.06e10, "constants": CONSTANTS | {"D": "256"}}, None),
        ({"flop": 9.9e9}, "99% of the products on tensor cores"),
        ({"uncounted": "a while loop"}, "a while loop"),
        ({"shared": 126_977}, "126,977 bytes of shared memory, recorded 126,976"),
        ({"shared": 232_449}, "232,449 bytes of shared memory, at most 232,448"),
        ({"traps": 1}, "1 traps, at most 0"),
        ({"tensor_core": {"HGMMA": 32, "HMMA": 16}}, "HMMA instead of HGMMA"),
        ({"loads": {2: 1, 4: 4, 8: 20, 16: 39}}, "25 narrow loads, recorded 24"),
        ({"arch": "gfx942"}, "no ceilings are recorded"),
        ({"shared": 101_377, "arch": "sm_80"}, "sm_86 has fewer"),
    ],
)
def test_check(changes, problem):
    ceilings = {
        static.key(_report(constants=_report().constants | {"D": D})): static.measured(_report())
        for D in ("64", "256")
    }
    found = static.problems([_report(**changes)], ceilings)
    assert not found if problem is None else any(problem in line for line in found), found


@pytest.mark.parametrize("kernel", static.KERNELS)
def test_costs_are_known(kernel):
    sizes = {"D": "128", "BT": "64", "CHUNK": "16", "KEEP": str(kernel.endswith("+"))}
    which, *reader = kernel.rstrip("+").split()
    sizes |= {"KEYS": str(reader == ["k"])} if reader else {}
    report = _report(kernel=f"{which}_kernel", constants=sizes)
    assert static.name(report) == kernel
    cost = static.cost(report)
    assert cost.bytes > 0 and (cost.flop > 0) == ("coefficients" not in kernel)


def test_launches_of_a_kernel_are_counted_together():
    """A group of blocks and the next one."""
    once = _report()
    [both] = static.together([once, once])
    assert both.executed == {"product": 40 * TOKENS, "integer": 1160 * TOKENS}
    assert (both.flop, both.needed, both.instructions) == (2e10, 2e10, once.instructions)
    assert static.a_token(both) == 1200 and static.a_token(both, "product") == 40


def test_record_keeps_other_versions_and_kernels(tmp_path, monkeypatch):
    file = tmp_path / "ceilings.json"
    file.write_text(json.dumps({"1.0": {"a": {}}, static.version(): {"b": {}}}))
    monkeypatch.setattr(static, "CEILINGS", file)
    static.record([_report()])
    row = {static.key(_report()): static.measured(_report())}
    assert static.recorded() == {"1.0": {"a": {}}, static.version(): {"b": {}} | row}


# ------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "cpu"])
def test_every_size_has_a_tile(arch, dtype):
    for D in range(16, 257, 16):
        assert tile(D, 4 * D, dtype, arch).slice <= 128
    assert tile(D, 4 * D, dtype, arch, 10**12).slice <= 128
    assert tile(64, 16, dtype, arch).slice == (64 if arch == "cpu" else 16)


def test_training_may_take_another_tile():
    """Where memory decides, blocks of 128 move half of the states."""
    for arch, D in (("sm_80", None), ("sm_90", 128), ("sm_100", None), ("cpu", None)):
        for size in (64, 128):
            alone, training = (
                tile(size, 4 * size, torch.bfloat16, arch, backward=x) for x in (False, True)
            )
            assert (alone.block > training.block) == (size == D)
        assert tile(64, 256, torch.float32, arch, backward=False).block == 32 or arch == "cpu"


def test_a_tile_may_be_forced():
    other = Tile(16, 16)
    with using(other):
        assert tile(64, 256, torch.bfloat16, "sm_90") is other
        with using(None):
            assert tile(64, 256, torch.bfloat16, "sm_90") != other
    assert tile(64, 256, torch.bfloat16, "sm_90") != other


def test_a_forced_tile_is_forced_in_its_thread_alone():
    """Also where both threads are inside at once."""
    both, tiles = threading.Barrier(2), (Tile(16, 16), Tile(32, 32))

    def found(choice):
        with using(choice):
            both.wait(60)
            size = tile(64, 256, torch.bfloat16, "sm_90")
            both.wait(60)
            return size

    with ThreadPoolExecutor(2) as pool:
        assert tuple(pool.map(found, tiles)) == tiles


@pytest.mark.parametrize(
    "longest, chunk, block",
    [
        *((0, 16, 16), (1, 16, 16), (16, 16, 16), (17, 16, 32), (65, 16, 128), (10**6, 16, 128)),
        # A chunk that a block held it still holds; one that spans blocks spans as many.
        *((1, 20, 32), (1, 64, 64), (1, 100, 128), (1, 200, 128)),
    ],
)
def test_short_sequences_get_short_blocks(longest, chunk, block):
    large = Tile(128, 32, 64)
    size = large.fitting(longest, chunk)
    assert size == dataclasses.replace(large, block=block, queries=min(64, block))
    assert (Blocks.of(chunk, size).span > 1) == (Blocks.of(chunk, large).span > 1)


def test_tile_that_does_not_fit_is_refused():
    assert Tile(16, 16).queries == 16
    with pytest.raises(ValueError, match="block: got 24"):
        Tile(24)
    with pytest.raises(ValueError, match="slice: got 8"):
        Tile(16, 8)
    with pytest.raises(ValueError, match="warps: got 3"):
        Schedule(3)
    with pytest.raises(ValueError, match="stages: got 0"):
        Schedule(4, 0)
    with pytest.raises(ValueError, match="scan: got 2 stages, takes 1"):
        Tile(scan=Schedule(4, 2))
