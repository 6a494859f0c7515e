"""Measures tiles and rewrites the table that ships: `python -m benchmarks.tune`

Goes down from the tile that ships: one field after another takes its other values, and the fastest
tile so far goes on. Every tile is first checked, on poisoned memory, against the PyTorch backend in
float64; one that does not compile, does not fit or is wrong is written down as such and left. What
was measured stands in a file, a line each, and is not measured again: stop it and start it anew.

    python -m benchmarks.tune --head-dim 64 128 --chunk 16 --out tune.jsonl
    python -m benchmarks.tune --head-dim 64 128 --chunk 16 --out tune.jsonl --write

The second writes the fastest into titans_kernels/kernels/tiles.py, once all are there.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from titans_kernels.kernels import tiles
from titans_kernels.kernels.tiles import Schedule, Tile, architecture, using

from .checking import Setting, alive, bound, error, results
from .journal import Journal, in_short
from .shapes import Shape

# In the order in which they are tried: sizes first, schedules fit them.
FIELDS: dict[str, tuple[Any, ...]] = {
    "block": (32, 64, 128),
    "slice": (32, 64, 128),
    "queries": (16, 32, 64, 128),
    "scan": (Schedule(4), Schedule(8)),
    **dict.fromkeys(
        ("retrieve", "recall"), tuple(Schedule(w, s) for w in (4, 8) for s in (1, 2, 3))
    ),
}
BACKWARD: dict[str, tuple[Any, ...]] = {
    "rows": (32, 64),
    **dict.fromkeys(
        ("retrieve_backward", "scan_backward", "inputs_backward"), (Schedule(4), Schedule(8))
    ),
}
NAMES = {value: name for name, value in vars(tiles).items() if isinstance(value, Schedule)}


def descend(
    start: Tile, fields: dict[str, tuple[Any, ...]] = FIELDS
) -> Generator[Tile, float | None, tuple[Tile, float | None]]:
    """Yields tiles, is sent their time or None for one that is no good; returns the fastest."""
    best, least = start, (yield start)
    for field, values in fields.items():
        middle = best
        for value in values:
            candidate = replace(middle, **{field: value})
            if candidate == middle:
                continue
            took = yield candidate
            if took is not None and (least is None or took < least):
                best, least = candidate, took
    return best, least


def measure(setting: Setting, tile: Tile) -> dict[str, Any]:
    """{"ms", "error"}, or {"problem"}, of one tile."""
    try:
        shape = setting.shape
        few = replace(shape, T=min(shape.T, 300), H=min(shape.H, 2))
        found = error(replace(setting, shape=few), tile)
        if not found <= bound(setting):
            return {"problem": f"wrong: relative error {found:.1e}", "error": found}
        inputs = setting.inputs()
        with using(tile):
            return {"ms": _milliseconds(setting, inputs), "error": found}
    except Exception as failure:  # whatever a compiler or a launch says of a tile that does not fit
        return {"problem": in_short(failure)}


def _milliseconds(setting: Setting, inputs: Any) -> float:
    """The median call: learning and answering, then reading, and all gradients if taken."""

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
    setting: Setting, journal: Journal, fields: dict[str, tuple[Any, ...]] = FIELDS
) -> Iterator[tuple[str, Tile]]:
    """What is still to be measured; the one who asks records it before the next.

    With gradients it starts from the tile that was found without.
    """
    s = setting.shape
    arch = architecture(torch.device(setting.device))
    size = f"{arch}, D {s.D}, chunk {s.chunk}"
    start = tiles.tile(s.D, s.hidden, getattr(torch, setting.dtype), arch, s.chunk)
    if setting.backward and (forward := journal.get("tuned", size)):
        start = _tile(forward["tile"])
    steps = descend(start, fields)
    try:
        tile = next(steps)
        while True:
            name = key(setting, tile)
            if "begun" in (journal.get("tune", name) or {"begun": 0}):
                yield name, tile
            row = journal.get("tune", name)
            assert row is not None, "the last one was not recorded"
            tile = steps.send(row.get("ms"))
    except StopIteration as end:
        best, least = end.value
        found = {"ms": least, "head_dim": s.D, "chunk": s.chunk, "arch": arch}
        found |= {"row": written(best), "tile": asdict(best)}
        journal.add("tuned", size + _gradients(setting), found)


def _tile(record: dict[str, Any]) -> Tile:
    parts = {n: Schedule(**x) if isinstance(x, dict) else x for n, x in record.items()}
    return Tile(**parts)


# --------------------------------------------------------------------------------------- the table


def written(tile: Tile) -> str:
    """As in the table, without what is as it would be anyway."""
    plain, parts = Tile(), [f"{tile.block}, {tile.slice}, {tile.queries}, {tile.rows}"]
    for name, value in vars(tile).items():
        if isinstance(value, Schedule) and value != getattr(plain, name):
            default = f"Schedule({value.warps}, {value.stages})"
            parts.append(f"{name}={NAMES.get(value, default)}")
    return f"Tile({', '.join(parts)})"


def rewrite(source: str, arch: str, head_dim: int, chunk: int, row: str, says: str) -> str:
    """The text of tiles.py with another tile for a size, and above it what was measured."""
    tree = ast.parse(source)
    [table] = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HALF"
    )
    assert isinstance(table, ast.Dict)
    rows = dict(
        zip((ast.literal_eval(key) for key in table.keys if key), table.values, strict=True)
    )
    for node in rows[arch].elts:  # type: ignore[attr-defined]
        most, longest, _ = node.elts
        limit = tiles.ANY if ast.unparse(longest) == "ANY" else ast.literal_eval(longest)
        if head_dim <= ast.literal_eval(most) and chunk <= limit:
            break
    lines = source.splitlines(keepends=True)
    first, last = node.lineno - 1, node.end_lineno
    if lines[first - 1].lstrip().startswith("#"):
        first -= 1
    text = f"({ast.unparse(most)}, {ast.unparse(longest)}, {row}),"
    lines[first:last] = [f"        # {says}\n", f"        {text}\n"]
    return "".join(lines)


def write(journal: Journal, device: str, path: Path = Path(tiles.__file__)) -> list[str]:
    """Put what was found into the table, with gradients after without; says what it wrote."""
    done = []
    for name, row in journal.stage("tuned").items():
        if row["ms"] is None:
            continue
        gradients = " with gradients" if name.endswith("gradients") else ""
        says = f"{row['ms']:.3f} ms{gradients}, {device}, {datetime.date.today().isoformat()}"
        source = path.read_text(encoding="utf-8")
        size = (row["arch"], row["head_dim"], row["chunk"])
        path.write_text(rewrite(source, *size, row["row"], says), encoding="utf-8")
        done.append(f"{name}: {row['row']}, {says}")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", path], check=False)
    return done


# ------------------------------------------------------------------------------------ command line


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
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
        for name, tile in walk(setting, journal, BACKWARD if backward else FIELDS):
            journal.add("tune", name, measure(setting, tile))
            print(f"{name}  {journal.get('tune', name)}", flush=True)
            if not alive(options.device):
                print("the GPU does not answer after this one: start again to go on")
                return 3
    if options.write:
        if options.device == "cpu":
            parser.error("--write: a table of times from the interpreter says nothing")
        print(*write(journal, torch.cuda.get_device_name()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
