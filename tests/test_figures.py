"""Figures in the documentation are those of a recorded run."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"]
RECORD = ROOT / "benchmarks" / "results" / "amd-epyc-2026-11-23.json"
FORM = {"layer": "its default", "layer-paper": "its paper form", "decode": "its default"}
DOES = {"forward": "forward", "forward+backward": "forward and backward"}


def _recorded():
    """The table of titans-pytorch and ours, as the recorded run has it."""
    rows = json.loads(RECORD.read_text())["rows"]
    for theirs in rows:
        if not theirs["provider"].startswith("titans-pytorch"):
            continue
        same = ("case", "shape", "mode")
        (ours,) = (
            row
            for row in rows
            if row["provider"] == "titans_kernels" and all(row[x] == theirs[x] for x in same)
        )
        step = theirs["case"] == "decode"
        does = "one token decoded" if step else DOES[theirs["mode"]]
        length = 1 if step else theirs["shape"]["T"]
        times = (f"{1e3 * x['median_s']:,.{1 if step else 0}f} ms" for x in (ours, theirs))
        ratios = (theirs["time_ratio"], theirs["memory_ratio"])
        factors = ("" if x is None else f"{x:.{1 if x < 10 else 0}f}x" for x in ratios)
        cells = [f"{FORM[theirs['case']]}, {does}", str(length), *times, *factors]
        yield f"| {' | '.join(cells)} |".replace("|  |", "| |")


def test_the_headline_is_in_the_table():
    found = re.search(
        r"(\d+)x faster than with titans-pytorch, in\s(\d+)x less", PAGES[0].read_text()
    )
    (row,) = (
        row for row in _recorded() if row.startswith("| its paper form, forward and backward")
    )
    assert row.endswith(f"| {found[1]}x | {found[2]}x |")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_figures_are_those_that_were_recorded(page):
    found = re.search(r"^\| \| T \| ours .*\n\|[-|]+\n((?:\|.*\n)+)", page.read_text(), re.M)
    assert found[1].splitlines() == list(_recorded())
