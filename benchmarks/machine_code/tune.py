"""Measures tiles and rewrites the table that ships: `python -m benchmarks.machine_code.tune`

Goes down from the tile that ships, without gradients and with: one field after another takes its
other values, and the fastest tile so far goes on. Every tile is first checked, on poisoned memory,
against the PyTorch backend in float64; one that does not compile, does not fit or is wrong is
written down as such and left. The values of a field are compiled in parallel before they are
timed. What was measured stands in a file, a line each, and is not measured again: stop it and start
it anew.

    python -m benchmarks.machine_code.tune --head-dim 64 128 --chunk 16 --out tune.jsonl
    python -m benchmarks.machine_code.tune --head-dim 64 128 --chunk 16 --out tune.jsonl --write

The second writes the fastest into titans_kernels/kernels/tiles.py, once all are there.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from titans_kernels.kernels import tiles
from titans_kernels.kernels.tiles import Schedule, Tile, architecture, using

from ..running.checking import Setting, alive, bound, error, results
from ..running.journal import Journal, in_short
from ..running.shapes import Shape

Change = dict[str, Any]  # fields of a tile, and what they become


def one(field: str, *values: Any) -> tuple[Change, ...]:
    return tuple({field: value} for value in values)


def warps(field: str) -> tuple[Change, ...]:
    return one(field, Schedule(4), Schedule(8))


def schedules(field: str) -> tuple[Change, ...]:
    return one(field, *(Schedule(w, s) for w in (4, 8) for s in (1, 2, 3)))


def blocks(*sizes: int) -> tuple[Change, ...]:
    """With the warps of scan, which holds a block: neither is fast without the other."""
    return tuple({"block": n, **scan} for n in sizes for scan in warps("scan"))


# In the order in which they are tried: sizes first, schedules fit them.
FORWARD = (
    blocks(32, 64, 128),
    one("slice", 32, 64, 128),
    one("queries", 16, 32, 64, 128),
    schedules("retrieve"),
)
TRAINING = (
    blocks(32, 64, 128),
    one("slice", 32, 64, 128),
    one("rows", 32, 64, 128),
    one("columns", 16, 32),
    schedules("recall"),
    *map(warps, ("retrieve_backward", "scan_backward", "inputs_backward")),
)
NAMES = {value: name for name, value in vars(tiles).items() if isinstance(value, Schedule)}


def descend(
    start: Tile, steps: Sequence[Sequence[Change]] = FORWARD
) -> Generator[list[Tile], list[float | None], tuple[Tile, float | None]]:
    """Yields tiles, is sent their times, None for one that is no good; returns the fastest."""
    best, [least] = start, (yield [start])
    for changes in steps:
        candidates = dict.fromkeys(replace(best, **change) for change in changes)
        others = [tile for tile in candidates if tile != best]
        for tile, took in zip(others, (yield others) if others else (), strict=True):
            if took is not None and (least is None or took < least):
                best, least = tile, took
    return best, least


def measure(setting: Setting, tile: Tile) -> dict[str, Any]:
    """{"ms", "error"}, or {"problem"}, of one tile."""
    try:
        found = error(fewer(setting), tile)
        if not found <= bound(setting):
            return {"problem": f"wrong: relative error {found:.1e}", "error": found}
        inputs = setting.inputs()
        with using(tile):
            return {"ms": milliseconds(setting, inputs), "error": found}
    except Exception as failure:  # whatever a compiler or a launch says of a tile that does not fit
        return {"problem": in_short(failure)}


def fewer(setting: Setting) -> Setting:
    """Of one sequence, no longer than it takes to launch the same kernels."""
    return replace(setting, shape=replace(setting.shape, B=1, T=min(setting.shape.T, 2100)))


def compile_ahead(setting: Setting, candidates: Sequence[Tile]) -> dict[str, Any]:
    """Put into Triton's cache what measuring will launch, in parallel processes."""
    return compile_all([(setting, tile) for tile in candidates])


def compile_all(jobs: Sequence[tuple[Setting, Tile | None]]) -> dict[str, Any]:
    """The same for more than one setting; None: the tile that ships."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1, 16), context) as pool:
        runs = [pool.submit(_launch, *job) for job in jobs]
    return {"problems": [in_short(x) for x in (run.exception() for run in runs) if x]}


def _launch(setting: Setting, tile: Tile | None) -> None:
    setting = fewer(setting)
    with using(tile) if tile else nullcontext():
        results(setting, setting.inputs(), "triton")


def milliseconds(setting: Setting, inputs: Any) -> float:
    """The median call: updates and outputs, then `retrieve`, and all gradients if taken."""

    def call() -> None:
        results(setting, inputs, "triton")

    if setting.device == "cuda":
        return triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")
    start = time.perf_counter()  # in the interpreter, which says nothing about a GPU
    call()
    return 1e3 * (time.perf_counter() - start)


def key(setting: Setting, tile: Tile) -> str:
    s = setting.shape
    sizes = f"{s.chunk}, {setting.dtype}, {s.B}x{s.H}x{s.T}"
    return f"D {s.D}, chunk {sizes}{_gradients(setting)}: {written(tile)}"


def _gradients(setting: Setting) -> str:
    return ", gradients" if setting.backward else ""


def walk(
    setting: Setting, journal: Journal, steps: Sequence[Sequence[Change]] | None = None
) -> Iterator[list[tuple[str, Tile]]]:
    """What is still to be measured, by name, as far as it is known; the caller records it."""
    s = setting.shape
    arch = architecture(torch.device(setting.device))
    dtype = getattr(torch, setting.dtype)
    start = tiles.tile(s.D, s.hidden, dtype, arch, s.chunk, setting.backward)
    down = descend(start, steps or (TRAINING if setting.backward else FORWARD))
    try:
        candidates = next(down)
        while True:
            names = [key(setting, tile) for tile in candidates]
            left = [
                (name, tile)
                for name, tile in zip(names, candidates, strict=True)
                if "begun" in (journal.get("tune", name) or {"begun": 0})
            ]
            if left:
                yield left
            rows = [journal.get("tune", name) for name in names]
            assert None not in rows, "a measurement was not recorded"
            candidates = down.send([row.get("ms") for row in rows if row])
    except StopIteration as end:
        best, least = end.value
        found = {"ms": least, "head_dim": s.D, "chunk": s.chunk, "arch": arch}
        found |= {"row": written(best), "backward": setting.backward}
        size = f"{arch}, D {s.D}, chunk {s.chunk}"
        journal.add("tuned", size + _gradients(setting), found)


# --------------------------------------------------------------------------------------- the table


def written(tile: Tile) -> str:
    """As in the table, without what is as it would be anyway."""
    plain, parts = Tile(), [f"{tile.block}, {tile.slice}, {tile.queries}, {tile.rows}"]
    for name, value in vars(tile).items():
        if isinstance(value, Schedule) and value != getattr(plain, name):
            default = f"Schedule({value.warps}, {value.stages})"
            parts.append(f"{name}={NAMES.get(value, default)}")
    return f"Tile({', '.join(parts)})"


def rewrite(
    source: str, arch: str, head_dim: int, chunk: int, backward: bool, row: str, says: str
) -> str:
    """The text of tiles.py with another tile for a size, and above it what was measured.

    Without a backward pass a size that has no tile of its own yet is given one.
    """
    name = "_HALF" if backward else "_FORWARD"
    [table] = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target) == name
    )
    assert isinstance(table, ast.Dict)
    [rows] = (
        value
        for at, value in zip(table.keys, table.values, strict=True)
        if at and ast.literal_eval(at) == arch
    )
    assert isinstance(rows, ast.Tuple)
    lines, closing = source.splitlines(keepends=True), rows.end_lineno
    assert closing
    if not rows.elts:
        lines[closing - 1] = lines[closing - 1].replace("()", "(\n    )")
        lines = "".join(lines).splitlines(keepends=True)
        closing += 1
    # A size with no tile of its own comes last: those before it are for smaller ones.
    most, longest, first, last = head_dim, str(chunk), closing - 1, closing - 1
    for node in rows.elts:
        assert isinstance(node, ast.Tuple) and node.end_lineno
        limits = [ast.unparse(x) for x in node.elts[:2]]
        if head_dim <= int(limits[0]) and (limits[1] == "ANY" or chunk <= int(limits[1])):
            most, longest, first, last = int(limits[0]), limits[1], node.lineno - 1, node.end_lineno
            first -= lines[first - 1].lstrip().startswith("#")
            break
    lines[first:last] = [f"        # {says}\n", f"        ({most}, {longest}, {row}),\n"]
    return "".join(lines)


def write(journal: Journal, device: str, path: Path = Path(tiles.__file__)) -> list[str]:
    """Put what was found into the tables; says what it wrote."""
    done = []
    for name, row in journal.stage("tuned").items():
        if row["ms"] is None:
            continue
        says = f"{row['ms']:.3f} ms, {device}, {datetime.date.today().isoformat()}"
        source = path.read_text(encoding="utf-8")
        size = (row["arch"], row["head_dim"], row["chunk"], row["backward"])
        path.write_text(rewrite(source, *size, row["row"], says), encoding="utf-8")
        done.append(f"{name}: {row['row']}, {says}")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", path], check=False)
    return done


# ------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--chunk", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("tune.jsonl"))
    parser.add_argument("--write", action="store_true", help="rewrite the table that ships")
    options = parser.parse_args(argv)

    journal = Journal(options.out)
    for D, chunk, backward in product(options.head_dim, options.chunk, (False, True)):
        shape = Shape(options.length, chunk, options.batch, options.heads, D)
        setting = Setting(shape, options.dtype, options.device, backward=backward)
        for left in walk(setting, journal):
            if options.device == "cuda":
                compile_ahead(setting, [tile for _, tile in left])
            for name, tile in left:
                journal.add("tune", name, measure(setting, tile))
                print(f"{name}  {journal.get('tune', name)}", flush=True)
                if not alive(options.device):
                    print("the GPU is lost after this one: start again to resume")
                    return 3
    if options.write:
        if options.device == "cpu":
            parser.error("--write: a table of times from the interpreter says nothing")
        print(*write(journal, torch.cuda.get_device_name()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
