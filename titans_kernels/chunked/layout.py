"""Where every token of every sequence goes: sequences to blocks of one size, chunks kept whole.

`chunk_size` is semantics: where gradients are anchored. The block is cost: how often weights are
materialised. A short chunk shares its block with others; a long one spans several blocks and none
crosses its end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms import values


class BlockSize(NamedTuple):
    tokens: int  # of a block
    chunks: int  # in a block, 1 where a chunk spans several
    blocks: int  # to a chunk, 1 where a block holds several

    @property
    def span(self) -> int:
        """Blocks that backward computes again at a time, from a state that forward kept.

        It then holds the states of all of them, and what their tokens computed.
        """
        return 16 if self.tokens <= 32 else 8

    def fitting(self, longest: int, chunk_size: int) -> BlockSize:
        """One that is no larger than the longest sequence: a single token is no block of 64."""
        if not 0 < longest < self.tokens:
            return self
        chunks = ceil(longest / chunk_size)
        return BlockSize(longest if chunks == 1 else chunks * chunk_size, chunks, self.blocks)


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


def checkpoints(tokens: int, chunk_size: int, block: BlockSize) -> int:
    """Rows for a state at every span's start but the first, of all sequences, at most.

    n tokens begin at most n / (tokens of a block) blocks after their first one. Two rows more: what
    is compiled for any number of tokens must not depend on whether there are none, or one.
    """
    if block.blocks == 1:
        return tokens // (block.span * block.tokens) + 2
    return tokens * block.blocks // (block.span * chunk_size) + 2


class Places(NamedTuple):
    """Where the tokens of a box lie in a tensor of rows."""

    row: Tensor  # [g, n, N] int64, 0 where there is none
    valid: Tensor | None  # [g, n, N] bool; None: all are there


class Span(NamedTuple):
    """A run of blocks of the sequences that are long enough to have any, a box of [g, n, N]."""

    start: int  # first block
    stop: int
    sequences: int  # n; sequences are sorted, so these are the first n
    checkpoint: int  # first row of its states
    tokens: Places
    queries: Places  # [g, n, N - first_query]
    first_query: int  # their first column: ahead of it are tails only
    moves: bool  # whether the last block hands on another state than it started with
    end: Tensor | None  # [g, n] int64: a block hands on the state after so many tokens; None: N
    whole: list[Tensor | None]  # per block that ends chunks, [n] bool: it ended one; None: for all


class Sequence(NamedTuple):
    start: int  # first token
    length: int
    tail: int  # tokens ahead that have no query
    query_start: int  # the first query


@dataclass(frozen=True)
class Layout:
    """Sequences in order of falling length."""

    sequences: list[Sequence]
    order: Tensor | None  # [N] int64, whose they are; None: in the order given
    chunk_size: int
    block: BlockSize
    device: torch.device

    @classmethod
    def of(
        cls, bounds: Tensor, tail: Tensor, query_start: Tensor, chunk_size: int, block: BlockSize
    ) -> Layout:
        """On a GPU this waits for it, once."""
        table = values(torch.stack([*bounds.unbind(1), tail, query_start], 1))
        found = [Sequence(first, end - first, *rest) for first, end, *rest in table]
        order = sorted(range(len(found)), key=lambda i: -found[i].length)
        same = order == list(range(len(order)))
        return cls(
            [found[i] for i in order],
            None if same else torch.tensor(order, device=bounds.device),
            chunk_size,
            block.fitting(max((x.length for x in found), default=0), chunk_size),
            bounds.device,
        )

    @property
    def still(self) -> bool:
        """Whether there is one block at most, and no chunk ends in it: the state stays."""
        longest = max((x.length for x in self.sequences), default=0)
        return longest < self.chunk_size and longest <= self.block.tokens

    def sort(self, x: Tensor) -> Tensor:
        """Rows of sequences as given to this order."""
        return x if self.order is None else x.index_select(0, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """And back."""
        return x if self.order is None else x.index_select(0, self.order.argsort())

    def blocks(self, sequence: Sequence) -> int:
        """Blocks of a sequence, the last one perhaps not full."""
        N, _, blocks = self.block
        if blocks == 1:
            return ceil(sequence.length / N)
        whole, rest = divmod(sequence.length, self.chunk_size)
        return whole * blocks + ceil(rest / N)

    def spans(self) -> Iterator[Span]:
        """Spans in time order."""
        counts = [self.blocks(x) for x in self.sequences]
        longest, step, row = max(counts, default=0), self.block.span, 0
        for start in range(0, longest, step):
            n = sum(count > start for count in counts)
            yield self._span(start, min(start + step, longest), n, row)
            row += n if start else 0  # the first span starts with what the walk does

    def _span(self, start: int, stop: int, n: int, checkpoint: int) -> Span:
        N, _, per_chunk = self.block
        C, here = self.chunk_size, self.sequences[:n]
        table = torch.tensor(here, device=self.device)
        first, total, tails, query = table[..., None].unbind(1)  # [n, 1]

        # [g, 1, N]
        position = torch.arange(start * N, stop * N, device=self.device).view(stop - start, 1, N)
        in_chunk = None
        if per_chunk > 1:
            in_chunk = position % (per_chunk * N)
            position = position // (per_chunk * N) * C + in_chunk

        longest, shortest = here[0].length, here[-1].length
        end, whole = None, []
        if per_chunk == 1:
            full = shortest >= stop * N
            moves = longest // C * C > (stop - 1) * N
            if shortest // C * C < stop * N and (moves or stop - start > 1):
                end = (total // C * C - position[..., :1]).clamp(0, N)[..., 0]
        else:
            full = per_chunk * N == C and shortest >= ceil(stop / per_chunk) * C
            # The last block of a chunk that stays open: the state behind it is not read.
            moves = longest // C * per_chunk >= stop or self.blocks(here[0]) > stop
            for i in range(start, stop):
                chunks = i // per_chunk + 1
                ended = None if shortest >= chunks * C else total[:, 0] >= chunks * C
                whole.append(ended)

        inside = None
        if not full:
            inside = position < total
            inside = inside if in_chunk is None else inside & (in_chunk < C)

        def places(row: Tensor, there: Tensor | None) -> Places:
            return Places(row if there is None else row.where(there, 0), there)

        tokens = places(first + position, inside)
        queries, first_query = tokens, 0
        if any(x.tail or x.query_start != x.start for x in here):
            least, most = min(x.tail for x in here), max(x.tail for x in here)
            if stop - start == 1:
                first_query = min(max(least - start * N, 0), N)
            position = position[..., first_query:]
            there = None if inside is None else inside[..., first_query:]
            if most > start * N + first_query:
                behind = position >= tails
                there = behind if there is None else there & behind
            queries = places(query - tails + position, there)
        return Span(start, stop, n, checkpoint, tokens, queries, first_query, moves, end, whole)
