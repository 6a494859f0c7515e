"""What a border between two ranks cuts: which sequences, and after how many of their tokens."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

ALL = slice(None)


class Border(NamedTuple):
    """Between two ranks.

    Args:
        rows: the sequences whose states go from the one to the other.
        tokens: that each of them has read since its last reset before the call, or since it began;
            None where that is not known.
    """

    rows: slice = ALL
    tokens: int | None = None

    @classmethod
    def unpacked(cls, at: int, before: int | None) -> Border:
        """After `at` tokens of every sequence in the call, and so many before it."""
        return cls(ALL, None if before is None else at + before)

    @classmethod
    def packed(cls, at: int, ends: list[int], persistent: int) -> Border:
        """After `at` tokens of a row with these cu_seqlens: the sequence that it cuts, if any."""
        row = bisect_left(ends, at) - 1  # the last that begins before it
        if row < 0 or ends[row + 1] == at:
            return cls(slice(0, 0))
        # Behind it all sequences have read the persistent ones: none is as after a reset.
        return cls(slice(row, row + 1), None if persistent else at - ends[row])

    def crossed(self, reset_every: int | None) -> bool:
        """Whether a memory with such resets, if it has some, needs what is before the border."""
        if self.rows == slice(0, 0):
            return False
        # A state that has read none is what it was made of, not necessarily what a reset makes.
        return reset_every is None or not self.tokens or self.tokens % reset_every != 0

    def select(self, state: Any) -> Any:
        """The state of the sequences that cross."""
        return state if self.rows == ALL else pytree.tree_map(lambda x: x[self.rows], state)

    def replace(self, state: Any, crossing: Any) -> Any:
        """The state of all sequences, with that of those which cross in its place."""
        if self.rows == ALL:
            return crossing
        first, end = self.rows.start, self.rows.stop
        return pytree.tree_map(lambda x, y: torch.cat([x[:first], y, x[end:]]), state, crossing)
