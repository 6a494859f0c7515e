"""The documentation's table of GPU figures, from recorded results alone.

Run `python -m benchmarks.reporting.page`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from .. import RESULTS, ROOT
from ..running.cases import OURS
from ..running.harness import Row

PAGE = ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(<!-- GPU figures, .*? -->\n)(.*?)(<!-- end of GPU figures -->)", re.DOTALL)


def newest(results: Path) -> Path | None:
    """The last recorded run on a GPU."""
    runs = {path: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    dates = {path: run["machine"]["date"] for path, run in runs.items() if _on_gpu(run)}
    return max(dates, key=lambda path: (dates[path], path.name), default=None)


def _on_gpu(run: dict[str, Any]) -> bool:
    return bool(run["machine"].get("driver"))


def table(path: Path) -> list[str]:
    """Ours and the peers, a line a case, mode and size; ratios of times."""
    run = json.loads(path.read_text(encoding="utf-8"))
    machine = run["machine"]
    rows = [Row.from_record(row) for row in run["rows"]]
    timed = [row for row in rows if row.problem is None and row.median_s is not None]
    others = list(dict.fromkeys(row.provider for row in timed if row.provider != OURS))
    lines = ["| | B x H x D | T | chunk | ours | " + " | ".join(others) + " |"]
    lines += ["|---|---|---|---|---|" + "---|" * len(others)]
    for ours in timed:
        if ours.provider != OURS:
            continue
        ratios = {
            row.provider: row.time_ratio
            for row in timed
            if (row.case, row.shape, row.mode) == (ours.case, ours.shape, ours.mode)
        }
        shape, ms = ours.shape, 1e3 * (ours.median_s or 0)
        cells = [f"{ours.case}, {ours.mode}", f"{shape.B} x {shape.H} x {shape.D}"]
        cells += [f"{shape.T:,}", str(shape.chunk), f"{ms:.3g} ms"]
        cells += [f"{ratios[x]:.3g}x" if ratios.get(x) else "" for x in others]
        lines.append("| " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        f"Of the others, how many times our time. {machine['device']}, {machine['driver']}, "
        f"torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit']}, "
        f"{machine['date']}; all rows in [benchmarks/results]({path_in(path)}).",
    ]


def path_in(path: Path) -> str:
    """Of the run's Markdown, as a link from the page."""
    return os.path.relpath(path.with_suffix(".md"), PAGE.parent).replace(os.sep, "/")


def refreshed(text: str, results: Path) -> str:
    """The page with the block between its two comments as it has to be."""
    run = newest(results)
    lines = ["No GPU figures yet."] if run is None else table(run)
    return BLOCK.sub(lambda block: block[1] + "\n".join(lines) + "\n" + block[3], text)


def refresh(page: Path, results: Path) -> bool:
    """Whether anything changed."""
    before = page.read_text(encoding="utf-8")
    after = refreshed(before, results)
    page.write_text(after, encoding="utf-8")
    return before != after


if __name__ == "__main__":
    changed = refresh(PAGE, RESULTS)
    print("refreshed" if changed else "nothing to do")
    sys.exit(0)
