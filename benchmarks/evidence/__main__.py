"""The command line: `python -m benchmarks.evidence --help`"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from .. import RESULTS
from ..running.machine import describe
from .models import ABLATIONS, KINDS
from .report import Report, machine_of
from .tasks import TASKS
from .training import SCHEDULES, run


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description="Train small models on recall tasks, record their accuracy by length.",
    )
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--model", nargs="+", choices=list(KINDS), help="only these (default: all)")
    seeds = "default: 0 1; without any nothing is trained, and notes are recorded"
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1], help=seeds)
    parser.add_argument("--steps", type=int, help="of training (default: the task's)")
    parser.add_argument("--note", action="append", default=[], help="a line to record besides")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder (default: {RESULTS})")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """What a day's commands find goes into one record, every run as soon as it is done."""
    options = parse(argv)
    torch.set_num_threads(1)
    name = f"evidence-{datetime.date.today().isoformat()}"
    schedules = dict(SCHEDULES)
    if options.steps:
        # A rehearsal never replaces a whole run.
        name += f"-{options.steps}-steps"
        schedules = {task: replace(s, steps=options.steps) for task, s in schedules.items()}
    path = options.out / f"{name}.json"
    report = Report.read(path) if path.exists() else Report(machine_of(describe(1, 256)))
    if options.seed:
        report.commands.append(" ".join(["python -m benchmarks.evidence", *_quoted(argv)]))
    report.notes += options.note

    # The plain models of every seed come first: a run that is cut short has seen each of them.
    kinds = options.model or [*(k for k in KINDS if k not in ABLATIONS), *ABLATIONS]
    for kind, task, seed in product(kinds, options.task, options.seed):
        found = run(TASKS[task], kind, seed, schedules[task])
        report.add(found, schedules[task])
        report.write(path)
        shares = ", ".join(f"{length}: {share:.0%}" for length, share in found.accuracy.items())
        print(f"{task:<7} {kind:<10} seed {seed} {found.seconds:5.0f} s  {shares}", flush=True)
    print("", *report.write(path), sep="\n")
    return 0


def _quoted(argv: Sequence[str]) -> list[str]:
    return [f'"{word}"' if " " in word else word for word in argv]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
