"""Training: ordinary PyTorch. The memory's own training, inside the model, changes nothing here."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..decay import parameter_groups
from ..train.measures import bits
from ..train.text import windows
from .model import ByteModel


@dataclass(frozen=True)
class Schedule:
    """How to train: at most `steps` steps, and about `seconds` seconds.

    A step reads `rows` pieces of `piece` bytes. Pieces follow each other through a window of text
    with the memory carried on, but not its gradient: 2 pieces at first, so that the model sees
    many texts, then twice as many in each quarter of the training, up to `longest` bytes, so that
    the memory learns to last.
    """

    steps: int
    seconds: float
    rows: int
    piece: int
    longest: int
    learning_rate: float = 6e-3
    warmup: int = 20

    def window(self, progress: float) -> int:
        return min(self.longest, 2 * self.piece * 2 ** int(4 * progress))

    def rate(self, step: int, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.learning_rate * min(1, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine)


def train(
    model: ByteModel, files: list[Tensor], schedule: Schedule, device: str, seed: int
) -> list[float]:
    """Train; returns the loss of every step in bits per byte. Draws a progress bar."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), betas=(0.9, 0.95))
    losses: list[float] = []
    smooth, progress, start = 8.0, 0.0, time.perf_counter()
    with tqdm(total=schedule.steps, desc="training", unit="step", mininterval=0.5) as bar:
        while progress < 1:
            length = schedule.window(progress)
            text = windows(files, length + 1, [generator] * schedule.rows).to(device)
            states = None
            for i in range(0, length, schedule.piece):
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(len(losses), progress)
                logits, states = model(text[:, i : i + schedule.piece], states)
                loss = bits(logits, text[:, i + 1 : i + schedule.piece + 1]).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                states = [state.detach() for state in states]

                losses.append(loss.item())
                smooth += (losses[-1] - smooth) * max(0.03, 1 / len(losses))
                seconds = time.perf_counter() - start
                speed = len(losses) * schedule.rows * schedule.piece / seconds
                bar.set_postfix_str(f"{smooth:.2f} bits per byte, {speed:,.0f} tokens/s", False)
                bar.update()
                progress = max(len(losses) / schedule.steps, seconds / schedule.seconds)
                if progress >= 1:
                    break
        bar.total = len(losses)
    return losses
