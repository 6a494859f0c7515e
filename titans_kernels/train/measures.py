"""Bits of text: of every token, and by how much has been read."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Bits that each byte costs: [B, T]."""
    nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return nats.view(targets.shape) / math.log(2)


def by_doubling(costs: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Averages over bytes 0 to first, to 2 first, 4 first ...: their ends, and [files, n]."""
    ends = [0, first]
    while ends[-1] < costs.shape[1]:
        ends.append(min(2 * ends[-1], costs.shape[1]))
    parts = [costs[:, a:b].mean(1) for a, b in pairwise(ends)]
    return torch.tensor(ends[1:]), torch.stack(parts, dim=1)
