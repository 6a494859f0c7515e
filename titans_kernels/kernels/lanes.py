"""Two lanes: what learns runs ahead of what reads.

The scan of a group needs nothing of the retrieve before it, and its programs, one for each sequence
and head, leave much of a GPU idle. So on CUDA groups learn on a stream of their own, of a higher
priority, and are read on the caller's. Groups take turns with the scratch: one learns once the
last group that had its scratch has been read.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch

Work = Callable[[], None]


class Lanes:
    """A context manager: on exit the caller's stream waits for all work of both lanes.

    Work of the lane ahead must not allocate: its tensors' memory belongs to the caller's stream.

    Args:
        device (torch.device): of the tensors. On a device without streams work runs in order.
        turns (int): groups that have a scratch at the same time; with one work runs in order.
    """

    def __init__(self, device: torch.device, turns: int) -> None:
        self._ahead = self._stream(device) if turns > 1 else None
        self._read: list[torch.Event | None] = [None] * turns

    def learn(self, turn: int, work: Work) -> None:
        """Run work that fills the scratch of a turn, after the last work that read it."""
        if self._ahead is None:
            return work()
        read = self._read[turn]
        if read is not None:
            self._ahead.wait_event(read)
        self._run(self._ahead, work)

    def read(self, turn: int, work: Work) -> None:
        """Run work that reads the scratch of a turn, after all `learn` so far."""
        if self._ahead is None:
            return work()
        here = self._current()
        here.wait_stream(self._ahead)
        self._run(here, work)
        self._read[turn] = here.record_event()

    def __enter__(self) -> Lanes:
        if self._ahead is not None:
            self._ahead.wait_stream(self._current())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ahead is not None:
            self._current().wait_stream(self._ahead)

    # Tests replace these three by streams that run as late as they may.

    _current = staticmethod(torch.cuda.current_stream)

    @staticmethod
    def _stream(device: torch.device) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @staticmethod
    def _run(stream: torch.cuda.Stream, work: Work) -> None:
        with torch.cuda.stream(stream):
            work()
