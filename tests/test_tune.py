"""The tuner checks before it times, measures nothing twice, and rewrites one row of the table."""

import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

from benchmarks.machine_code import tune
from benchmarks.running import checking
from benchmarks.running.checking import Setting
from benchmarks.running.journal import Journal
from benchmarks.running.shapes import Shape
from titans_kernels.kernels import tiles
from titans_kernels.kernels.tiles import Schedule, Tile

TINY = Setting(Shape(T=20, H=1, D=16), "float32", "cpu")
FEW = (tune.one("block", 16, 32), tune.one("queries", 16))


def _all(journal):
    """Measure whatever is left; the tiles that were."""
    seen = []
    for left in tune.walk(TINY, journal, FEW):
        for name, tile in left:
            seen.append(tile)
            journal.add("tune", name, tune.measure(TINY, tile))
    return seen


def test_measures_and_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "tune.jsonl"
    seen = _all(Journal(path))
    assert len(seen) >= 3 and len(set(seen)) == len(seen)
    rows = Journal(path).stage("tune")
    assert len(rows) == len(seen)
    assert all(row["ms"] > 0 and row["error"] < 1e-5 for row in rows.values())
    [best] = Journal(path).stage("tuned").values()
    assert best["ms"] == min(row["ms"] for row in rows.values())

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])  # it was stopped while it wrote
    again = _all(Journal(path))
    assert again[0] == seen[2] and not set(again) & set(seen[:2])


def test_gradients_are_tuned_by_themselves(tmp_path):
    journal = Journal(tmp_path / "tune.jsonl")
    _all(journal)
    setting = replace(TINY, backward=True)
    [(name, tile)] = next(tune.walk(setting, journal))
    assert tile == Tile() and "gradients" in name
    assert tune.measure(setting, tile)["error"] < 1e-4


def test_takes_the_fastest_of_what_is_right():
    times = {16: 3.0, 32: None, 64: 2.0, 128: 2.5}  # tokens to a block; None: wrong
    scan = tune.one("scan", Schedule(8))
    steps = tune.descend(Tile(64, 64, 16), (tune.one("block", 16, 32, 64, 128), scan))
    tiles, groups = next(steps), []
    with pytest.raises(StopIteration) as end:
        while True:
            groups.append([tile.block for tile in tiles])
            took = [(times[tile.block], tile.scan.warps) for tile in tiles]
            tiles = steps.send([t and t - 0.1 * (warps == 8) for t, warps in took])
    assert end.value.value == (Tile(64, 64, 16, scan=Schedule(8)), 1.9)
    assert groups == [[64], [16, 32, 128], [64]]


def test_compiles_ahead_and_says_what_does_not():
    """In other processes, each with the tile that it is given."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    with mock.patch.dict("os.environ", environment), mock.patch("os.cpu_count", return_value=1):
        odd = replace(TINY, shape=replace(TINY.shape, D=24))
        assert tune.compile_ahead(TINY, [Tile(16, 16)]) == {"problems": []}
        [problem] = tune.compile_ahead(odd, [Tile(16, 16)])["problems"]
        assert problem.startswith("NotImplementedError: backend")


def test_a_tile_that_does_not_fit_is_written_down():
    with mock.patch.object(tune, "error", side_effect=RuntimeError("out of resources\nmore")):
        row = tune.measure(TINY, Tile(16, 16))
    assert row == {"problem": "RuntimeError: out of resources"}


@pytest.mark.parametrize("fault", ["unwritten", "off"])
def test_what_is_unwritten_or_off_is_wrong(fault):
    real = checking.results

    def faulty(setting, inputs, backend):
        found = real(setting, inputs, "torch")
        if backend == "triton":
            found[0] = torch.empty_like(found[0]) if fault == "unwritten" else 1.001 * found[0]
        return found

    with mock.patch.object(checking, "results", faulty):
        row = tune.measure(TINY, Tile(16, 16))
    assert row["problem"].startswith("wrong: relative error") and "ms" not in row


# ------------------------------------------------------------------------------------- the table

SOURCE = Path(tiles.__file__).read_text()


def _table(source):
    """(head dimension, architecture, chunk, backward) -> repr of the tile, in rewritten source."""
    module = ModuleType("rewritten")
    with mock.patch.dict(sys.modules, rewritten=module):
        exec(compile(source, "rewritten", "exec"), vars(module))

    def tile(D, arch, chunk, backward):
        return repr(module.tile(D, 4 * D, torch.bfloat16, arch, chunk, backward))

    return tile


OTHER = Tile(32, 16, 16, scan=Schedule(8), retrieve=Schedule(4, 2), recall=Schedule(16, 4))
SIZES = list(product((64, 128, 256), tiles.ARCHITECTURES, (16, 64), (False, True)))


def _rewritten(source, *size):
    D, arch, chunk, backward = size
    row = tune.written(OTHER)
    return tune.rewrite(source, arch, D, chunk, backward, row, "1.234 ms, a GPU")


@pytest.mark.parametrize(
    "size",
    [
        ("sm_90", 64, 16, True),
        ("sm_90", 128, 64, True),
        ("gfx942", 256, 16, True),
        ("sm_90", 64, 16, False),
    ],
    ids=str,
)
def test_one_row_is_rewritten(size):
    arch, D, chunk, backward = size
    text = _rewritten(SOURCE, D, arch, chunk, backward)
    before, after = _table(SOURCE), _table(text)
    assert after(D, arch, chunk, backward) == repr(OTHER)
    assert "        # 1.234 ms, a GPU\n" in text
    changed = set(text.splitlines()) - set(SOURCE.splitlines())
    assert len(changed) == 2 and len(text.splitlines()) == len(SOURCE.splitlines())
    differ = [x for x in SIZES if before(*x) != after(*x)]
    assert (D, arch, chunk, backward) in differ and all(x[:2] == (D, arch) for x in differ)
    assert backward or not any(x[3] for x in differ)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_size_gets_a_row_of_its_own_without_gradients(arch):
    """Where training's tile served so far; nothing else has another after it."""
    text = SOURCE
    sizes = ((128, 16), (128, 64), (256, 16))
    for D, chunk in sizes:
        before = _table(text)
        text = _rewritten(text, D, arch, chunk, False)
        after = _table(text)
        assert after(D, arch, chunk, False) == repr(OTHER)
        differ = {x for x in SIZES if before(*x) != after(*x)}
        assert all(x[0] <= D and x[1] == arch and x[2] <= chunk and not x[3] for x in differ)
        if arch == "sm_90":
            assert differ == {(D, arch, chunk, False)}
    assert text.count("# 1.234 ms, a GPU") == len(sizes)


def test_a_tile_is_written_as_the_table_has_it():
    shipped = tiles.tile(128, 512, torch.bfloat16, "sm_90")
    assert tune.written(shipped) in SOURCE.replace("\n", " ")
    assert eval(tune.written(shipped), vars(tiles)) == shipped
    odd = replace(shipped, recall=Schedule(16, 4))
    assert eval(tune.written(odd), vars(tiles)) == odd
