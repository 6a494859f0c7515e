"""Train a model on a task, evaluate it by length."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import Model
from .tasks import IGNORED, VOCABULARY, Task, texts


@dataclass(frozen=True)
class Schedule:
    """How long, how much at once, how fast; the same for every model."""

    steps: int
    tokens: int = 1024  # of a step
    rate: float = 5e-3
    warm_up: int = 20
    evaluation: int = 128  # texts of every length in the evaluation


SCHEDULES = {"mqar": Schedule(800), "needle": Schedule(400)}


@dataclass
class Run:
    """A model that was trained and evaluated; all that is recorded of it."""

    task: str
    model: str
    seed: int
    parameters: int
    accuracy: dict[int, float]  # by length of text
    losses: list[float]  # nats a question, the mean of every tenth of training
    seconds: float

    def record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Run:
        accuracy = {int(length): share for length, share in record["accuracy"].items()}
        return cls(**{**record, "accuracy": accuracy})


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats a question."""
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)


def run(task: Task, kind: str, seed: int, schedule: Schedule) -> Run:
    """Every model of a seed reads the same texts."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model(kind, VOCABULARY)
    optimizer = optimizer_of(model, schedule.rate)
    start, losses = time.perf_counter(), []
    for step in range(schedule.steps):
        length = task.lengths[step % len(task.lengths)]
        # Every text has all its pairs. Among fewer, any of the values is often the right one: a
        # model learns first to retrieve them all with one query, and is slow to unlearn that.
        tokens, targets = texts(task, schedule.tokens // length, length, generator)
        # Warm up, then down to a tenth in a line.
        left = 1 - 0.9 * step / schedule.steps
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * min(1, (step + 1) / schedule.warm_up) * left
        loss = loss_of(model, tokens, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    tenth = max(1, schedule.steps // 10)
    parts = [losses[i : i + tenth] for i in range(0, len(losses), tenth)]
    return Run(
        task.name,
        kind,
        seed,
        sum(p.numel() for p in model.parameters()),
        {length: evaluate(model, task, length, schedule) for length in task.evaluated},
        [round(sum(part) / len(part), 4) for part in parts],
        round(seconds, 1),
    )


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, length: int, schedule: Schedule) -> float:
    """The share of questions answered correctly, on texts unseen in training."""
    generator = torch.Generator().manual_seed(10_000 + length)
    right = total = 0
    for _ in range(0, schedule.evaluation, 32):
        tokens, targets = texts(task, min(32, schedule.evaluation), length, generator)
        questions = targets != IGNORED
        right += int((model(tokens).argmax(-1) == targets)[questions].sum())
        total += int(questions.sum())
    return right / total
