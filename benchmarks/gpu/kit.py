"""What stages are made of: steps, the budget, and subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import ROOT
from ..running.checking import alive
from ..running.journal import Journal, Row, in_short

ATTEMPTS = 2  # at a step that takes its process along
AGAIN, MORE = 3, 4  # exit codes: a new process has to continue; another call has to


@dataclass(frozen=True)
class Kit:
    """What every stage gets.

    Args:
        journal (Journal): what is there already, and where results go.
        deadline (float): of time.monotonic().
        rehearse (bool): on the CPU, tiny sizes, kernels interpreted.
        commit (str): of the sources, where they travel without their history.
    """

    journal: Journal
    deadline: float
    rehearse: bool = False
    commit: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def dtype(self) -> str:
        return "float32" if self.rehearse else "bfloat16"

    def left(self) -> float:
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Step:
    """A piece of work with one result.

    Args:
        name (str): its place in the journal.
        run (Callable): returns the result; an exception is one, too.
        seconds (float): not begun with less than that left.
    """

    name: str
    run: Callable[[], Row]
    seconds: float = 30.0


Steps = Generator[Step, None, None]
Stage = Callable[[Kit], Steps]


def work(kit: Kit, stages: dict[str, Stage]) -> int:
    """Do what is not done. 0: all is, MORE: out of time, AGAIN: this process has lost its GPU."""
    for stage, steps in stages.items():
        for step in steps(kit):
            row = kit.journal.get(stage, step.name)
            begun = 0 if row is None else row.get("begun", 0)
            if row is not None and "begun" not in row:
                continue
            if begun >= ATTEMPTS:
                kit.journal.add(
                    stage, step.name, {"problem": f"did not end in {ATTEMPTS} attempts"}
                )
                continue
            if kit.left() < step.seconds:
                print(f"{stage}, {step.name}: {kit.left():.0f} s left, stopped before it")
                return MORE
            kit.journal.add(stage, step.name, {"begun": begun})
            start = time.monotonic()
            try:
                row = step.run()
            except Exception as failure:
                row = {"problem": in_short(failure)}
            if row.pop("unfinished", False):
                print(f"{stage}, {step.name}: stopped in the middle")
                return MORE
            kit.journal.add(stage, step.name, {**row, "seconds": time.monotonic() - start})
            print(f"{stage}, {step.name}: {_in_a_line(row)}", flush=True)
            if "problem" in row and not alive(kit.device):
                return AGAIN
    return 0


def blame(journal: Journal, stages: Iterable[str]) -> None:
    """The step in flight has taken its process along, or does not end: one attempt less.

    If the whole kit is killed, no step is blamed: that says nothing about the step.
    """
    for stage in stages:
        for step, row in journal.stage(stage).items():
            if "begun" in row:
                journal.add(stage, step, {"begun": row["begun"] + 1})


def _in_a_line(row: Row) -> str:
    said = row.get("tail", "").strip().rsplit("\n", 1)[-1]
    parts = {name: x for name, x in row.items() if isinstance(x, str | int | float)} | {
        "tail": said
    }
    return ", ".join(
        f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}"
        for name, x in parts.items()
        if x
    )


def program(kit: Kit, command: Sequence[str | Path], **environment: str) -> Row:
    """Run a program in the repository until the time is up: its exit code and what it said."""
    env = os.environ | environment
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, kit.left() - 5),
        )
    except subprocess.TimeoutExpired:
        return {"unfinished": True}
    found: Row = {"exit": done.returncode, "tail": done.stdout}
    if done.returncode:
        found["problem"] = f"exit code {done.returncode}"
    return found


def python(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, *arguments]
