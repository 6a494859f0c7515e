"""Which processes of a run are lost: each leaves signs of life in the store."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

EVERY = 1.0  # seconds between two signs
PATIENCE = 5.0  # seconds without any after which a process is lost
NO_STORE = {0: "it keeps the store, which does not respond"}


class Signs:
    """Signs of life of all processes of the default group, and the errors that ended some.

    Backends report that a connection is closed, not whose: a process that waits for another gets
    the error of an operation that many take part in.
    """

    def __init__(self, store: Any, rank: int, count: int) -> None:
        # A client of its own: another thread's waiting must not hold up the signs.
        self.store, self.rank, self.count = store.clone(), rank, count
        self._stop = threading.Event()
        self._write(0)
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def _live(self) -> None:
        sign = 0
        while not self._stop.wait(EVERY):
            sign += 1
            try:
                self._write(sign)
            except RuntimeError:  # the store is gone, with the process that kept it
                return

    def _write(self, sign: int) -> None:
        self.store.set(f"titans_kernels/sign/{self.rank}", str(sign))

    def end(self, error: BaseException | None) -> None:
        """The last sign; others read in it by what error this process has ended."""
        self._stop.set()
        self._thread.join(EVERY)
        if error is not None:
            text = (str(error).splitlines() or [""])[0]
            try:
                key = f"titans_kernels/error/{self.rank}"
                self.store.set(key, f"{type(error).__name__}: {text}")
            except RuntimeError:
                pass

    def lost(self) -> dict[int, str]:
        """The ranks that are lost, or have failed, and what is known of why."""
        found: SimpleQueue[dict[int, str]] = SimpleQueue()

        def look() -> None:
            try:
                before = self._signs()
                time.sleep(PATIENCE)
                silent = [r for r, sign in self._signs().items() if sign == before[r]]
                found.put({r: self._why(r) for r in silent if r != self.rank})
            except RuntimeError:
                found.put(NO_STORE)

        # A store whose process hangs never returns, whatever timeout it is given.
        threading.Thread(target=look, daemon=True).start()
        try:
            return found.get(timeout=4 * PATIENCE)
        except Empty:
            return NO_STORE

    def _signs(self) -> dict[int, str]:
        names = [f"titans_kernels/sign/{rank}" for rank in range(self.count)]
        self.store.wait(names, timedelta(seconds=PATIENCE))
        return dict(enumerate(value.decode() for value in self.store.multi_get(names)))

    def _why(self, rank: int) -> str:
        key = f"titans_kernels/error/{rank}"
        if self.store.check([key]):
            return self.store.get(key).decode()
        return f"no sign of life for {PATIENCE:g} s"


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """Errors of communication in here name the processes that are lost, if there are any.

    Raises:
        RuntimeError: naming their ranks, from the error of communication.
    """
    signs = Signs(_get_default_store(), dist.get_rank(), dist.get_world_size())
    try:
        yield
    except RuntimeError as error:
        if not (lost := signs.lost()):
            signs.end(error)
            raise
        message = "; ".join(
            f"rank {rank} of {signs.count} is lost: {why}" for rank, why in lost.items()
        )
        signs.end(None)
        raise RuntimeError(message) from error
    except BaseException as error:
        signs.end(error)
        raise
    else:
        signs.end(None)
