"""Synthetic recall tasks: associative recall (MQAR), and a needle.

A text is pairs of a key and its value, filler, and questions: a key again, where the model has to
predict the value. The keys of a text are distinct, values are drawn anew for every text, and the
target is not part of the text at a question: only the pair gives it away. Keys, values and filler
are disjoint sets of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEYS, VALUES, FILLER = 16, 16, 16
VOCABULARY = KEYS + VALUES + FILLER
IGNORED = -100  # what cross_entropy ignores


@dataclass(frozen=True)
class Task:
    """What a text is made of.

    Args:
        name (str): of the task.
        pairs (int): key and value pairs, one after the other, no key twice.
        questions (int): every question is a token; their keys are drawn with replacement.
        spread (bool): pairs stand first and questions anywhere behind them (MQAR, as in Zoology);
            else the pairs stand anywhere in the first eighth, and the last tokens are questions.
        lengths (tuple[int, ...]): of texts in training, taken in turns.
        evaluated (tuple[int, ...]): of texts in the evaluation.
    """

    name: str
    pairs: int
    questions: int
    spread: bool
    lengths: tuple[int, ...]
    evaluated: tuple[int, ...]

    @property
    def shortest(self) -> int:
        return 2 * self.pairs + self.questions


TASKS = {
    task.name: task
    for task in (
        Task("mqar", 8, 32, True, (64, 128), (64, 128, 256, 512, 1024)),
        Task("needle", 1, 8, False, (64, 128), (64, 128, 256, 512, 1024)),
    )
}


def texts(task: Task, n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n texts: (tokens [n, length], targets [n, length], IGNORED but at the questions)."""
    if length < (takes := task.shortest if task.spread else 16 * task.pairs + task.questions):
        raise ValueError(f"length: got {length}, takes at least {takes} in task {task.name}")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def choose(count: int, of: int) -> Tensor:
        """For every text `count` different numbers below `of`, in any order."""
        return torch.rand(n, of, generator=generator).argsort(1)[:, :count]

    keys = choose(task.pairs, KEYS)
    values = KEYS + draw(VALUES, n, task.pairs)
    tokens = KEYS + VALUES + draw(FILLER, n, length)
    targets = torch.full((n, length), IGNORED)

    behind = 2 * task.pairs
    if task.spread:
        where = torch.arange(0, behind, 2).expand(n, -1)
        places = behind + choose(task.questions, length - behind)
    else:
        where = 2 * choose(task.pairs, length // 16)
        places = torch.arange(length - task.questions, length).expand(n, -1)
    tokens.scatter_(1, where, keys)
    tokens.scatter_(1, where + 1, values)
    which = draw(task.pairs, n, task.questions)
    tokens.scatter_(1, places, keys.gather(1, which))
    targets.scatter_(1, places, values.gather(1, which))
    return tokens, targets
