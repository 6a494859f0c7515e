"""At home: what came back, as results and on their page: `python -m benchmarks.gpu.collect DIR`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import RESULTS
from ..machine_code import tune
from ..reporting import page, report
from ..running.harness import Row as Timed
from ..running.journal import Journal, Row
from ..running.machine import Machine
from .matrix import cases
from .stages import STAGES


def gather(folder: Path) -> tuple[report.Report, Journal]:
    """The run as the benchmarks have it, and everything else that is in the journals."""
    *earlier, last = sorted(folder.rglob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    journal = Journal(last, *earlier)
    bench = journal.stage("bench") | journal.stage("more")
    machine = bench.pop("machine", {}).get("machine")
    if machine is None:
        raise SystemExit(f"{folder}: the stage 'bench' never ran: nothing says what machine it was")
    run = report.Report(Machine(**machine), "python -m benchmarks.gpu")
    for row in bench.values():
        run.rows += [Timed.from_record(record) for record in row.get("rows", ())]
    run.appendix = [*_missing(bench), *_stages(journal)]
    return run, journal


def _missing(bench: dict[str, Row]) -> list[str]:
    lost = [f"- {name}: {row['problem']}" for name, row in bench.items() if "problem" in row]
    return ["", "Not timed:", "", *lost] if lost else []


def _stages(journal: Journal) -> list[str]:
    """A section a stage: what was found by its steps, or why nothing was."""
    lines = []
    for stage in STAGES:
        rows = journal.stage(stage)
        if stage in ("bench", "more") or not rows:
            continue
        bad = sum("problem" in row for row in rows.values())
        lines += ["", f"## {stage}", "", f"{len(rows)} steps, {bad} with a problem.", ""]
        lines += ["| step | found |", "|:--|:--|"]
        lines += [f"| {name} | {_found(row)} |" for name, row in rows.items()]
        for name, row in rows.items():
            lines += _counters(name, row.get("kernels", []))
    return lines


def _found(row: Row) -> str:
    if "problem" in row or "begun" in row:
        return str(row.get("problem", "not finished"))
    if "error" in row:
        ms = f"{row['ms']:.3f} ms, " if "ms" in row else ""
        return f"{ms}relative error {row['error']:.1e}"
    said = row.get("tail", "").strip().rsplit("\n", 1)[-1]
    return said.replace("|", "/") or "done"


def _counters(name: str, kernels: list[Row]) -> list[str]:
    """A launch a line, the first of each kernel."""
    first = {row["kernel"]: row for row in reversed(kernels)}
    if not first:
        return []
    columns = list(next(iter(first.values())))
    lines = ["", f"{name}, the first launch of each kernel:", ""]
    lines += ["| " + " | ".join(columns) + " |", "|:--" + "|--:" * (len(columns) - 1) + "|"]
    return lines + [
        "| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in first.values()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.collect", description=__doc__)
    parser.add_argument("folder", type=Path, help="with the journals that came back")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    parser.add_argument("--tiles", action="store_true", help="put tuned tiles into the table")
    options = parser.parse_args(argv)

    run, journal = gather(options.folder)
    files = report.write(run, cases(), options.out, run.machine.slug)
    try:
        from ..reporting.plots import draw

        files += draw(files[0])
    except ImportError as missing:
        print(f"no plots: {missing.name} is not installed")
    print(*files, sep="\n")
    if page.refresh(options.page, options.out):
        print(options.page)
    if options.tiles:
        print(*tune.write(journal, run.machine.device), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
