"""The command line: `python -m benchmarks --help`"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from . import RESULTS
from .reporting import report
from .running.breakdown import breakdown
from .running.cases import CASES, OURS
from .running.harness import QUICK, Effort, measure
from .running.machine import describe

PROFILED = ("layer", "operator", "decode")  # the others are one of them at other sizes


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check titans_kernels, time it and its peers, record the results.",
    )
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, help="only these", metavar="CASE")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that all works")
    parser.add_argument("--profile", action="store_true", help="also show where our time goes")
    parser.add_argument("--rounds", type=int, help="measurements of each provider")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the record, tables to stderr")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 1 if ours was wrong anywhere."""
    options = parse(argv)
    screen = sys.stderr if options.json else sys.stdout
    torch.set_num_threads(options.threads)
    chosen = QUICK if options.quick else Effort()
    effort = Effort(
        options.rounds or chosen.rounds,
        chosen.seconds,
        chosen.round_seconds,
        options.threads,
        not options.no_memory,
    )
    cases = tuple(case for case in CASES if not options.cases or case.name in options.cases)
    machine = describe(options.threads, 256 if options.quick else 2048)
    run = report.Report(machine, " ".join(["python -m benchmarks", *argv]))
    print(f"{machine.line()}\n{machine.ceiling()}\n\n{report.header()}", file=screen, flush=True)
    shapes = {case.name: case.quick if options.quick else case.shapes for case in cases}
    todo = [(c, *what) for c in cases for what in product(shapes[c.name], c.modes)]
    with tqdm(todo, unit="case", disable=None, leave=False) as progress:
        for case, shape, mode in progress:
            progress.set_description(f"{case.name}, T {shape.T}, {mode}")
            for row in measure(case, shape, mode, machine, effort):
                run.rows.append(row)
                progress.write(report.line(row), file=screen)

    profiled = [case for case in cases if options.profile and case.name in PROFILED]
    for case, mode in ((c, m) for c in profiled for m in c.modes):
        shape = shapes[case.name][0]
        part = report.Breakdown(case.name, shape, mode, breakdown(case, shape, mode))
        run.breakdowns.append(part)
        lines = report.breakdown_lines(part, machine.matmul_flops)
        print("", *lines, sep="\n", file=screen, flush=True)

    # A part of the matrix, or a rehearsal, never replaces a whole run.
    name = "-".join([machine.slug, *(options.cases or []), *(["quick"] if options.quick else [])])
    files = report.write(run, cases, options.out, name)
    try:
        from .reporting.plots import draw

        files += draw(files[0])
    except ImportError as missing:
        print(f"no plots: {missing.name} is not installed", file=screen)
    print("", *files, sep="\n", file=screen)
    if options.json:
        print(json.dumps(run.record()))
    return int(any(row.problem and row.provider == OURS for row in run.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
