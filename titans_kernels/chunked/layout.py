"""Where every token of every sequence goes: sequences to blocks of one size, chunks kept whole.

`chunk_size` is semantics: it says where gradients are anchored. The block is cost: it says how
often weights are materialised. A short chunk shares its block with others; a long one spans
several blocks and none crosses its end. A sequence may begin with a tail, the tokens of a chunk
that an earlier call left open; chunks count from the tail's first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, isqrt
from typing import NamedTuple

import torch
from torch import Tensor


class BlockSize(NamedTuple):
    tokens: int  # of a block
    chunks: int  # in a block, 1 where a chunk spans several
    blocks: int  # to a chunk, 1 where a block holds several


def block_size(chunk_size: int, device: torch.device) -> BlockSize:
    """The block for a chunk size: at most 64 tokens, and at least about 16 on a CPU, 64 on a GPU.

    A block costs passes over the state, a chunk inside it products with the state that a block of
    its own would not need. A CPU has its state in cache, so blocks as short as the paper's chunk
    are the fastest there; on a GPU launches count, and long blocks save them.
    """
    smallest, largest = (16 if device.type == "cpu" else 64), 64
    if chunk_size < smallest:
        return BlockSize(smallest // chunk_size * chunk_size, smallest // chunk_size, 1)
    blocks = ceil(chunk_size / largest)
    return BlockSize(ceil(chunk_size / blocks), 1, blocks)


class Span(NamedTuple):
    """A run of blocks of the sequences that are long enough to have any, a box of [g, n, N]."""

    start: int  # first block
    stop: int
    sequences: int  # n; sequences are sorted, so these are the first n
    token: Tensor  # [g, n, N] int64, its place in (tails, tokens), 0 where there is none
    valid: Tensor | None  # [g, n, N] bool; None: all are tokens
    end: Tensor | None  # [g, n] int64: a block hands on the state after so many tokens; None: N
    whole: list[Tensor | None]  # per block that ends chunks, [n] bool: it ended one; None: for all


@dataclass(frozen=True)
class Layout:
    """Sequences in order of falling length, their tails in one table ahead of all tokens.

    Args:
        tails (list[int]): tokens of each sequence's open chunk, taken from row i of the table.
        lengths (list[int]): tokens that follow.
        starts (list[int]): where they start.
        rows (list[int]): row of the table.
        table (int): tokens of the whole table, rows times chunk_size; 0 without one.
    """

    tails: list[int]
    lengths: list[int]
    starts: list[int]
    rows: list[int]
    table: int
    chunk_size: int
    block: BlockSize
    device: torch.device

    def blocks(self, sequence: int) -> int:
        """Blocks of a sequence, the last one perhaps not full."""
        total = self.tails[sequence] + self.lengths[sequence]
        whole, rest = divmod(total, self.chunk_size)
        N, _, blocks = self.block
        if blocks == 1:
            return ceil(total / N)
        return whole * blocks + ceil(rest / N)

    def spans(self) -> Iterator[Span]:
        """Spans in time order, about as many as each has blocks, so that memory is least."""
        counts = [self.blocks(i) for i in range(len(self.lengths))]
        longest = max(counts, default=0)
        step = max(1, isqrt(longest))
        for start in range(0, longest, step):
            n = sum(count > start for count in counts)
            yield self._span(start, min(start + step, longest), n)

    def _span(self, start: int, stop: int, n: int) -> Span:
        N, _, per_chunk = self.block
        C = self.chunk_size
        column = lambda x: torch.tensor(x[:n], device=self.device)[:, None]  # noqa: E731
        tails, lengths, starts, rows = map(
            column, (self.tails, self.lengths, self.starts, self.rows)
        )
        total = tails + lengths  # [n, 1]

        block = torch.arange(start, stop, device=self.device)[:, None, None]  # [g, 1, 1]
        offset = torch.arange(N, device=self.device)
        if per_chunk == 1:
            position = block * N + offset
            inside = position < total
        else:
            in_chunk = block % per_chunk * N + offset
            position = block // per_chunk * C + in_chunk
            inside = (position < total) & (in_chunk < C)
        index = torch.where(
            position < tails, rows * C + position, self.table + starts - tails + position
        )

        shortest = self.tails[n - 1] + self.lengths[n - 1]
        end, whole = None, []
        if per_chunk == 1:
            full = shortest >= stop * N
            if shortest // C * C < stop * N:
                end = (total // C * C - block * N).clamp(0, N)[..., 0]
        else:
            full = per_chunk * N == C and shortest >= ceil(stop / per_chunk) * C
            for i in range(start, stop):
                chunks = i // per_chunk + 1
                ended = None if shortest >= chunks * C else total[:, 0] >= chunks * C
                whole.append(ended)
        if full:
            return Span(start, stop, n, index, None, end, whole)
        return Span(start, stop, n, index.where(inside, 0), inside, end, whole)

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """The open chunks at the end: tokens [n, C] as in a span, valid [n, C], length [n]."""
        C = self.chunk_size
        column = lambda x: torch.tensor(x, device=self.device)[:, None]  # noqa: E731
        tails, starts, rows = map(column, (self.tails, self.starts, self.rows))
        total = tails + column(self.lengths)
        length = total % C
        offset = torch.arange(C, device=self.device)
        position = total - length + offset
        index = torch.where(
            position < tails, rows * C + position, self.table + starts - tails + position
        )
        valid = offset < length
        return index.where(valid, 0), valid, length[:, 0].to(torch.int32)
