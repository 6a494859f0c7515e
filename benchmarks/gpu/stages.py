"""The stages, each a generator of steps. A later step may depend on what an earlier one found."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from titans_kernels.kernels.tiles import Tile, using

from ..machine_code import tune
from ..running.cases import Case
from ..running.checking import Setting, results
from ..running.harness import QUICK, Effort, measure
from ..running.journal import Row
from ..running.machine import Machine, describe
from ..running.shapes import Shape
from .first import check, first
from .kit import Kit, Stage, Step, Steps, program, python
from .matrix import cases

# ------------------------------------------------------------------------------------------- tests

WORDS = 6000  # characters of what a program said last
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.suite")
PYTEST += ("--continue-on-collection-errors",)


def tests(kit: Kit) -> Steps:
    """The tests' own bounds judge. Each test is a result of its own, see suite.py."""
    precision = "tests/test_kernels_precision.py"
    suites = {"gpu": ["tests", "-m", "gpu"], "precision": [precision, "-m", "not gpu"]}
    if kit.rehearse:
        suites = {"precision": [precision, "-k", "reading_by_the_yardstick and bf16"]}
    # Workers share the GPU: most of the time goes into compiling.
    workers = () if kit.rehearse or find_spec("xdist") is None else ("-n", "6")
    for name, arguments in suites.items():
        command = python(*PYTEST, *workers, *arguments)
        run = partial(_run, kit, command, GPU_JOURNAL=str(kit.journal.path.resolve()))
        yield Step(name, run, 5 if kit.rehearse else 60)


# ------------------------------------------------------------------------------------------- tiles

AT_ONCE = 24  # checks whose kernels are compiled together


def checks(kit: Kit) -> Steps:
    """Every shipped tile on poisoned memory; where programs share a multiprocessor, twice alike."""
    yield from _reruns(kit)
    settings = list(_settings(kit))
    for start in range(0, len(settings), AT_ONCE):
        some = settings[start : start + AT_ONCE]
        if not kit.rehearse:  # interpreted, nothing is compiled
            ahead = partial(tune.compile_all, [(x, None) for x in some])
            yield Step(f"compile {start} and on", ahead, 60)
        for setting in some:
            name = f"{setting.dtype}, D {setting.shape.D}, chunk {setting.shape.chunk}"
            name += f", depth {setting.depth}" + (", gradients" if setting.backward else "")
            yield Step(name, partial(check, setting, _tile(kit)))


def _tile(kit: Kit) -> Tile | None:
    return Tile(16, 16) if kit.rehearse else None


def _settings(kit: Kit) -> Iterator[Setting]:
    """The sizes that most models have come first."""
    if kit.rehearse:
        for D in (16, 32):
            yield Setting(Shape(16, 16, 1, 1, D, 2), kit.dtype, kit.device, backward=D == 16)
        return
    sizes = product(("bfloat16", "float16", "float32"), (64, 128, 16, 48, 256), (16, 64, 100))
    for dtype, D, chunk in sizes:
        for depth, backward in product((2, 1) if chunk == 16 else (2,), (False, True)):
            yield Setting(Shape(300, chunk, 2, 2, D), dtype, kit.device, depth, backward)


def _reruns(kit: Kit) -> Steps:
    """The same bits again, where there are two programs to a multiprocessor and more."""
    for heads, backward in product((1,) if kit.rehearse else (264, 528), (False, True)):
        if kit.rehearse and backward:
            continue
        shape = Shape(16, 16, heads, 1, 16, 2) if kit.rehearse else Shape(2048, 16, heads // 4, 4)
        setting = Setting(shape, kit.dtype, kit.device, backward=backward)
        name = f"{heads} heads twice" + (", gradients" if backward else "")
        yield Step(name, partial(_twice, setting, _tile(kit)), 10)


def _twice(setting: Setting, choice: Tile | None) -> Row:
    inputs = setting.inputs()
    with using(choice) if choice else nullcontext():
        runs = [results(setting, inputs, "triton") for _ in range(2)]
    unlike = sum(not torch.equal(*pair) for pair in zip(*runs, strict=True))
    return {"problem": f"{unlike} tensors differ"} if unlike else {"tensors": len(runs[0])}


def _run(kit: Kit, command: list[str | Path], **environment: str) -> Row:
    row = program(kit, command, **environment)
    return row | {"tail": row["tail"][-WORDS:]} if "tail" in row else row


def verify(kit: Kit) -> Steps:
    command = python("-m", "titans_kernels.verify", "--device", kit.device)
    command += ["--env"] if kit.rehearse else []
    yield Step("verify", partial(_run, kit, command), 2 if kit.rehearse else 90)


# ------------------------------------------------------------------------------------------- speed


def bench(kit: Kit) -> Steps:
    """The machine's own ceilings, then the headline: ours, attention and other peers."""

    def machine() -> Row:
        found = asdict(describe(1, 64 if kit.rehearse else 8192, kit.device))
        return {"machine": found | ({"commit": kit.commit} if kit.commit else {})}

    yield Step("machine", machine, 5 if kit.rehearse else 20)
    yield from _timed(kit, [case for case in cases(kit.rehearse) if case.name in HEADLINE])


def more(kit: Kit) -> Steps:
    """The other cases."""
    yield from _timed(kit, [case for case in cases(kit.rehearse) if case.name not in HEADLINE])


HEADLINE = ("operator", "decode", "layer")


def _timed(kit: Kit, chosen: list[Case]) -> Steps:
    """Ours and its peers, a step a case, mode and shape."""
    row = kit.journal.get("bench", "machine")
    if row is None or "machine" not in row:
        return
    found = Machine(**row["machine"])
    effort = replace(QUICK, memory=False) if kit.rehearse else Effort(5, 10.0, 0.3)
    for case in chosen:
        for shape, mode in product(case.shapes, case.modes):
            name = f"{case.name}, {mode}, {shape.B} x {shape.H} x {shape.D}, T {shape.T}"
            name += f", chunk {shape.chunk}"

            def step(case=case, shape=shape, mode=mode) -> Row:
                rows = list(measure(case, shape, mode, found, effort))
                timed: Row = {"rows": [row.record() for row in rows]}
                ours = rows[0]
                return timed | ({"problem": ours.problem} if ours.problem else {"s": ours.median_s})

            yield Step(name, step, 5 if kit.rehearse else 40)


def tuned(kit: Kit) -> Steps:
    """One step a tile; the next one depends on what was found."""
    settings = [
        Setting(Shape(4096, chunk, 8, 16, D), kit.dtype, kit.device)
        for D, chunk in ((64, 16), (128, 16), (64, 64), (128, 64), (256, 16))
    ]
    if kit.rehearse:
        settings = [Setting(Shape(16, 16, 1, 1, 16), kit.dtype, kit.device)]
    for setting, backward in product(settings, (False,) if kit.rehearse else (False, True)):
        setting = replace(setting, backward=backward)
        steps = (tune.one("block", 16),) if kit.rehearse else None
        for left in tune.walk(setting, kit.journal, steps):
            ahead = partial(tune.compile_ahead, setting, [tile for _, tile in left])
            yield Step(f"compile {left[0][0]} and so on", ahead, 5 if kit.rehearse else 45)
            for name, tile in left:
                yield Step(name, partial(tune.measure, setting, tile), 5 if kit.rehearse else 20)


# ------------------------------------------------------------------------------------------- tools

KERNELS = "regex:^scan.*_kernel$"
METRICS = {
    "gpu__time_duration.sum": "ns",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "programs by registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% warps active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "% tensor pipe",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "% SM",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "% L1",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "% L2",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% DRAM",
    "dram__bytes.sum": "DRAM bytes",
}


def ncu(kit: Kit) -> Steps:
    """Counters of scan, there and back; the clocks are left as they are."""
    if shutil.which("ncu") is None:
        yield _missing("ncu")
        return
    for D, B, mode in (
        (64, 8, "forward"),
        (64, 1, "forward"),
        (128, 8, "forward"),
        (64, 8, "both"),
    ):
        sizes = ["--head-dim", D, "--batch", B, "--mode", mode, "--device", kit.device]
        command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units"]
        command += ["base", "--metrics", ",".join(METRICS), "--kernel-name", KERNELS]
        command += [
            "--launch-count",
            "24",
            *python("-m", "benchmarks.gpu.launch", *map(str, sizes)),
        ]
        yield Step(f"D {D}, batch {B}, {mode}", partial(_profile, kit, command), 60)


def _profile(kit: Kit, command: list[str]) -> Row:
    row = program(kit, command)
    text = row.get("tail", "")
    return row | {"tail": text[-WORDS:], "kernels": counters(text)} if text else row


def counters(text: str) -> list[Row]:
    """Rows of ncu's CSV, of every launch its name and the METRICS by their short names."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = [row for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))) if row["ID"]]
    return [
        {"kernel": row["Kernel Name"].split("(")[0]}
        | {short: row[name] for name, short in METRICS.items() if row.get(name)}
        for row in rows
    ]


def _missing(tool: str) -> Step:
    return Step(tool, lambda: {"problem": f"{tool} is not here"})


def sanitizer(kit: Kit) -> Steps:
    """Without PyTorch's cache, every tensor has bounds of its own."""
    if shutil.which("compute-sanitizer") is None:
        yield _missing("compute-sanitizer")
        return
    for tool, (chunk, mode) in product(
        ("memcheck", "racecheck", "synccheck", "initcheck"),
        ((16, "forward"), (100, "forward"), (16, "both")),
    ):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        sizes = ("--small", "--chunk", str(chunk), "--mode", mode, "--device", kit.device)
        command += map(str, python("-m", "benchmarks.gpu.launch", *sizes))
        run = partial(_run, kit, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        yield Step(f"{tool}, chunk {chunk}, {mode}", run, 90)


# What says most comes first: a GPU may be gone at any minute.
STAGES: dict[str, Stage] = {
    "first": first,
    "bench": bench,
    "tiles": checks,
    "tune": tuned,
    "ncu": ncu,
    "verify": verify,
    "more": more,
    "tests": tests,
    "sanitizer": sanitizer,
}
