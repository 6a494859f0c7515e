"""Shipped kernels compile to what was recorded, and every size and architecture has a tile."""

import dataclasses
import json

import pytest
import torch

from benchmarks import offline, static
from titans_kernels.kernels.tiles import ARCHITECTURES, Schedule, Tile, tile

LAUNCH = "benchmarks.static:launch"


# A subprocess each, so that two workers compile at a time.
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shipped_kernels(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cases = [{"head_dim": D, "arch": arch} for D in static.HEAD_DIMS]
    reports = offline.collect(LAUNCH, [arch], cases)
    assert [static.name(r) for r in reports] == [*static.KERNELS] * len(cases)
    ceilings = static.recorded().get(static.version(), {})
    assert not ceilings or {static.key(r) for r in reports} <= ceilings.keys()
    assert static.problems(reports, ceilings) == []
    if arch == "sm_80":  # its tiles serve GPUs with less shared memory, too
        assert max(r.shared for r in reports) <= 99 * 1024


# -------------------------------------------------------------------------------- the check itself


def _report(**changes):
    report = offline.Report(
        kernel="retrieve_kernel",
        arch="sm_90",
        num_warps=8,
        num_stages=2,
        constants={"D": "64", "BD": "64", "BT": "64", "BH": "64", "BQ": "64"},
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
    )
    return dataclasses.replace(report, **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"registers": 216}, None),
        ({"registers": 217}, "224 registers, recorded 216"),
        ({"stack": 8}, "8 bytes of stack, at most 0"),
        ({"stack": 8, "constants": {"D": "256", "BD": "64", "BT": "64", "BH": "64"}}, None),
        ({"stack": 264, "arch": "sm_80", "tensor_core": {"HMMA": 256}}, "at most 256"),
        ({"shared": 126_977}, "126,977 bytes of shared memory, recorded 126,976"),
        ({"shared": 232_449}, "232,449 bytes of shared memory, at most 232,448"),
        ({"traps": 1}, "1 traps, at most 0"),
        ({"tensor_core": {"HGMMA": 31}}, "31 products, 32 needed"),
        ({"tensor_core": {"HGMMA": 32, "HMMA": 16}}, "HMMA instead of HGMMA"),
        ({"loads": {2: 1, 4: 4, 8: 20, 16: 39}}, "25 narrow loads, recorded 24"),
    ],
)
def test_check(changes, problem):
    ceilings = {static.key(_report()): static.measured(_report())}
    found = static.problems([_report(**changes)], ceilings)
    assert not found if problem is None else any(problem in line for line in found), found


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
        assert tile(D, 4 * D, dtype, arch).slice <= 64
    assert tile(64, 16, dtype, arch).slice == (64 if arch == "cpu" else 16)


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
