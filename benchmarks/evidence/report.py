"""Results: JSON, Markdown and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from statistics import mean
from typing import Any

from ..reporting import style
from ..running.machine import Machine
from .models import ABLATIONS, DIM, HEADS, KINDS, LAYERS
from .tasks import FILLER, KEYS, TASKS, VALUES
from .training import Run, Schedule

STYLES = {
    "memory": (style.BLUE, "o-"),
    "mag": (style.GREEN, "D-"),
    "tnt": (style.PURPLE, "*-"),
    "window": (style.VERMILION, "s--"),
    "linear": (style.GREY, "^--"),
    "delta": (style.ORANGE, "P--"),
    "eta = 0": (style.SKY, "v-"),
    "alpha = 0": (style.ORANGE, "<-"),
    "depth 1": (style.PURPLE, ">-"),
    "not onto keys": (style.GREEN, "*-"),
    "no conv": (style.VERMILION, "x-"),
    "theta 0.1": (style.BLACK, "+-"),
}


@dataclass
class Report:
    """Runs on one machine, with one schedule for each task."""

    machine: dict[str, Any]
    commands: list[str] = field(default_factory=list)
    schedules: dict[str, Schedule] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what else was tried, what does not hold

    def record(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "commands": self.commands,
            "schedules": {task: asdict(schedule) for task, schedule in self.schedules.items()},
            "tasks": {name: asdict(TASKS[name]) for name in self.tasks},
            "models": {name: KINDS[name].what for name in self.kinds},
            "runs": [run.record() for run in self.runs],
            "notes": self.notes,
        }

    @classmethod
    def read(cls, path: Path) -> Report:
        record = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            record["machine"],
            record["commands"],
            {task: Schedule(**schedule) for task, schedule in record["schedules"].items()},
            [Run.from_record(run) for run in record["runs"]],
            record["notes"],
        )

    @property
    def tasks(self) -> list[str]:
        return [name for name in TASKS if any(run.task == name for run in self.runs)]

    @property
    def kinds(self) -> list[str]:
        return [name for name in KINDS if any(run.model == name for run in self.runs)]

    def of(self, task: str, kind: str) -> list[Run]:
        return [run for run in self.runs if (run.task, run.model) == (task, kind)]

    def add(self, run: Run, schedule: Schedule) -> None:
        """A run replaces an earlier one of the same task, model and seed."""

        def same(other: Run) -> bool:
            return (other.task, other.model, other.seed) == (run.task, run.model, run.seed)

        self.runs = [other for other in self.runs if not same(other)] + [run]
        self.schedules[run.task] = schedule

    def write(self, path: Path) -> list[Path]:
        """The record, and the pages and pictures made of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.record(), indent=1) + "\n", encoding="utf-8")
        text = path.with_suffix(".md")
        text.write_text(markdown(self), encoding="utf-8")
        return [path, text, draw(self, path.with_suffix(".png"))]


def machine_of(machine: Machine) -> dict[str, Any]:
    """What of a machine bears on accuracies: no speeds."""
    kept = "device", "capability", "threads", "python", "torch", "titans_kernels", "commit", "date"
    return {name: getattr(machine, name) for name in kept}


def markdown(report: Report) -> str:
    machine = report.machine
    lines = [
        f"# Does the memory remember? {machine['date']}",
        "",
        *[f"    {command}" for command in report.commands],
        "",
        f"{machine['device']} ({machine['capability']}), {machine['threads']} thread(s), float32 | "
        f"torch {machine['torch']} | Python {machine['python']} | titans_kernels "
        f"{machine['titans_kernels']} at {machine['commit']} | {machine['date']}",
        "",
        f"Models of {LAYERS} layers, width {DIM}, {HEADS} heads, whose MLPs make them the same "
        f"size. Vocabulary: {KEYS} keys, {VALUES} values, {FILLER} fillers; chance knows the "
        f"values and is right in 1 of {VALUES}. A cell is the mean over seeds of the share of "
        "questions answered correctly, and in parentheses the worst and the best seed.",
    ]
    for name in report.tasks:
        lines += ["", f"## {name}", "", _task_line(report, name), ""]
        lengths = TASKS[name].evaluated
        head = ["model", "what", "parameters", "seeds", *map(str, lengths)]
        lines.append("| " + " | ".join(head) + " |")
        lines.append("|:--|:--|--:|--:|" + "--:|" * len(lengths))
        for kind in report.kinds:
            if runs := report.of(name, kind):
                cells = [_cell([run.accuracy[length] for run in runs]) for length in lengths]
                size = f"{runs[0].parameters:,} | {len(runs)}"
                lines.append(f"| {kind} | {KINDS[kind].what} | {size} | {' | '.join(cells)} |")
    lines += ["", "## Loss in training", "", "Nats a question, every tenth of the steps.", ""]
    lines += ["| task | model | seed | seconds | losses |", "|:--|:--|--:|--:|:--|"]
    for run in report.runs:
        losses = " ".join(f"{loss:.2f}" for loss in run.losses)
        lines.append(f"| {run.task} | {run.model} | {run.seed} | {run.seconds:.0f} | {losses} |")
    if report.notes:
        lines += ["", "## Notes", "", *[f"- {note}" for note in report.notes]]
    return "\n".join(lines) + "\n"


def _task_line(report: Report, name: str) -> str:
    task, schedule = TASKS[name], report.schedules[name]
    where = (
        "pairs first, questions anywhere behind"
        if task.spread
        else "pairs in the first eighth, questions last"
    )
    trained = " and ".join(map(str, task.lengths))
    return (
        f"{task.pairs} pair(s) and {task.questions} questions: {where}, among filler. "
        f"Trained on texts of {trained} tokens: {schedule.steps} steps of {schedule.tokens:,} "
        f"tokens, AdamW, learning rate {schedule.rate:g}. Evaluation: {schedule.evaluation} texts "
        "of every length."
    )


def _cell(shares: Sequence[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    spread = "" if low == high else f" ({low.rstrip('%')}-{high})"
    return f"{mean(shares):.0%}{spread}"


def draw(report: Report, path: Path) -> Path:
    """Accuracy against length: every task with its models, and the ablations of the memory."""
    panels = []
    for task in report.tasks:
        for title, names in (
            (task, [kind for kind in KINDS if kind not in ABLATIONS]),
            (f"{task}: without a part", ["memory", *ABLATIONS]),
        ):
            kinds = [kind for kind in names if report.of(task, kind)]
            if title == task or len(kinds) > 1:
                panels.append((task, title, kinds))
    columns = 2 if len(panels) > 1 else 1
    height = ceil(len(panels) / columns) or 1
    figure, axes = style.panels(5 * columns, 3.8 * height, height, columns)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (task, title, kinds) in zip(axes.flat, panels, strict=False):
        for kind in kinds:
            colour, line = STYLES[kind]
            runs = report.of(task, kind)
            lengths = TASKS[task].evaluated
            by_length = [[run.accuracy[length] for run in runs] for length in lengths]
            axis.plot(lengths, [mean(x) for x in by_length], line, color=colour, label=kind, ms=4)
            if len(runs) > 1:
                low, high = [min(x) for x in by_length], [max(x) for x in by_length]
                axis.fill_between(lengths, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.axvline(max(TASKS[task].lengths), color=style.GREY, linewidth=1, linestyle=":")
        axis.set_xscale("log", base=2)
        axis.set_xticks(TASKS[task].evaluated, [str(length) for length in TASKS[task].evaluated])
        axis.set(title=title, xlabel="tokens (dotted: the longest in training)", ylim=(0, 1.03))
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axis.grid(alpha=0.3)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 3}
        axis.legend(frameon=False, fontsize=8, **below)
    for row in axes:
        row[0].set_ylabel("questions answered correctly")
    machine = report.machine
    source = f"{machine['device']}, float32, torch {machine['torch']}, commit {machine['commit']}"
    return style.save(figure, path, f"{source}, {machine['date']}; shaded: worst to best seed")
