"""What the text costs without a model: for scale."""

from __future__ import annotations

import gzip

import torch
from torch import Tensor


def bigram_bits(train: list[Tensor], text: Tensor) -> float:
    """Bits per byte of `text` [rows, T], each byte guessed from the one before, as in `train`."""
    counts = torch.full((256, 256), 0.1)
    for file in train:
        pairs = 256 * file[:-1].long() + file[1:].long()
        counts += torch.bincount(pairs, minlength=256**2).view(256, 256)
    bits = -torch.log2(counts / counts.sum(1, keepdim=True))
    return float(bits[text[:, :-1], text[:, 1:]].mean())


def gzip_bits(text: Tensor) -> float:
    """Bits per byte of gzip, which learns from each row of `text` alone."""
    compressed = [gzip.compress(bytes(row.tolist()), 9, mtime=0) for row in text]
    return 8 * sum(map(len, compressed)) / text.numel()
