"""Results: an aligned table, Markdown and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..running.breakdown import Share
from ..running.cases import OURS, Case
from ..running.harness import Row
from ..running.machine import Machine
from ..running.shapes import Shape

COLUMNS = (
    "case",
    "B x H x D",
    "T",
    "chunk",
    "mode",
    "provider",
    "median ms",
    "p20",
    "p80",
    "calls",
    "tokens/s",
    "GFLOP/s",
    "of product",
    "of copy",
    "peak MiB",
    "x time",
    "x memory",
)
WIDTHS = (14, 11, 6, 5, 16, 20, 9, 9, 9, 5, 9, 7, 10, 7, 8, 6, 8)
LEFT = (True, False, False, False, True, True, *[False] * 11)


@dataclass(frozen=True)
class Breakdown:
    """Where one call's time goes."""

    case: str
    shape: Shape
    mode: str
    shares: list[Share]


@dataclass
class Report:
    """A run."""

    machine: Machine
    command: str
    rows: list[Row] = field(default_factory=list)
    breakdowns: list[Breakdown] = field(default_factory=list)
    appendix: list[str] = field(default_factory=list)  # lines of Markdown

    def record(self) -> dict[str, Any]:
        return {
            "machine": asdict(self.machine),
            "command": self.command,
            "rows": [row.record() for row in self.rows],
            "breakdowns": [asdict(b) for b in self.breakdowns],
        }


def header() -> str:
    return _aligned(COLUMNS)


def line(row: Row) -> str:
    """A row, aligned under the header."""
    if row.problem:
        return f"{_aligned(_cells(row)[:6])}  {row.problem}"
    return _aligned(_cells(row))


def breakdown_lines(breakdown: Breakdown, ceiling: float) -> list[str]:
    shape = breakdown.shape
    title = f"{breakdown.case}, {breakdown.mode}, T {shape.T}, chunk {shape.chunk}: where it goes"
    lines = [title, f"{'group':<22}{'ms':>10}{'share':>8}{'calls':>9}{'of ceiling':>12}"]
    for share in breakdown.shares:
        fraction = "" if share.flops is None else f"{share.flops / ceiling:.0%}"
        lines.append(
            f"{share.group:<22}{share.seconds * 1e3:>10.2f}{share.share:>8.1%}"
            f"{share.calls:>9.0f}{fraction:>12}"
        )
    return lines


def write(report: Report, cases: tuple[Case, ...], folder: Path, name: str) -> list[Path]:
    """The run as JSON, from which plots are made, and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_markdown = folder / f"{name}.json", folder / f"{name}.md"
    as_json.write_text(json.dumps(report.record(), indent=1) + "\n", encoding="utf-8")
    as_markdown.write_text(markdown(report, cases), encoding="utf-8")
    return [as_json, as_markdown]


def markdown(report: Report, cases: tuple[Case, ...]) -> str:
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in report.rows))
    lines = [
        f"# {report.machine.device}, {report.machine.date}",
        "",
        f"    {report.command}",
        "",
        report.machine.line(),
        "",
        f"Ceilings, measured in the same run: {report.machine.ceiling()}.",
        "",
        f"In {dtypes}. A time is the median of calls that providers took in turns; p20 and p80 "
        f"are percentiles. x time and x memory: how many times that of {OURS}, paired in one run. "
        "Peak memory: growth of a process of its own over what it held when the call began, "
        "parameters and inputs. GFLOP/s: matrix products that are done, those done again in the "
        "backward pass included, over the whole time. Of product: of the first ceiling. Of copy: "
        "of the second, if inputs, parameters and output, with backward their gradients too, were "
        "all that is moved, once.",
    ]
    for case in cases:
        rows = [row for row in report.rows if row.case == case.name]
        if rows:
            lines += ["", f"## {case.name}", "", case.about, ""]
            lines += ["| " + " | ".join(COLUMNS[1:]) + " |"]
            lines += ["|" + "|".join(":--" if x else "--:" for x in LEFT[1:]) + "|"]
            lines += [_markdown_row(row) for row in rows]
    for breakdown in report.breakdowns:
        ceiling = report.machine.matmul_flops
        lines += ["", *(f"    {x}" for x in breakdown_lines(breakdown, ceiling))]
    return "\n".join([*lines, *report.appendix]) + "\n"


def _markdown_row(row: Row) -> str:
    cells = _cells(row)[1:]
    if row.problem:
        cells = [*cells[:5], row.problem, *[""] * (len(cells) - 6)]
    return "| " + " | ".join(cells) + " |"


def _aligned(cells: tuple[str, ...] | list[str]) -> str:
    parts = zip(cells, WIDTHS, LEFT, strict=False)
    return "  ".join(f"{x:<{w}}" if left else f"{x:>{w}}" for x, w, left in parts).rstrip()


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    rate = row.flop / row.median_s if row.flop and row.median_s else None
    return [
        row.case,
        f"{row.shape.B} x {row.shape.H} x {row.shape.D}",
        str(row.shape.T),
        str(row.shape.chunk),
        row.mode,
        row.provider,
        *(number(x, ".2f", 1e3) for x in (row.median_s, row.p20_s, row.p80_s)),
        number(row.calls, "d", 1),
        number(row.tokens_per_s, ",.0f"),
        number(rate, ".1f", 1e-9),
        number(row.of_ceiling, ".0%"),
        number(row.of_copy, ".1%"),
        number(row.peak_bytes, ",.1f", 2**-20),
        number(row.time_ratio, ".2f"),
        number(row.memory_ratio, ".2f"),
    ]
