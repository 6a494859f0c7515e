"""Milliseconds of every kernel that a call launches, by CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

# Clock cycles that the GPU waits for before each launch, about a millisecond: the host is ahead
# then, and the time between two events is that of the kernel between them.
AHEAD = 2_000_000

Launches = list[tuple[str, Callable[[], float]]]  # names in order, and their milliseconds


@contextmanager
def timed(device: str) -> Iterator[Launches]:
    """Every launch inside, one at a time; milliseconds are known once the device is done."""
    launches: Launches = []
    owner = JITFunction if device == "cuda" else InterpretedFunction
    launch = owner.run

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        clock = _events if device == "cuda" else _wall
        result, milliseconds = clock(lambda: launch(kernel, *args, **kwargs))
        launches.append((kernel.__name__, milliseconds))
        return result

    with mock.patch.object(owner, "run", run):
        yield launches


def _events(launch: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    result = launch()
    end.record()
    return result, lambda: start.elapsed_time(end)


def _wall(launch: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
    start = time.perf_counter()
    result = launch()
    took = 1e3 * (time.perf_counter() - start)
    return result, lambda: took


def milliseconds(call: Callable[[], Any], device: str, repeats: int = 5) -> dict[str, float]:
    """By kernel, all its launches of a call together: the median of some calls."""
    call()  # compiles
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        with timed(device) as launches:
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, took in launches:
            sums[name] = sums.get(name, 0.0) + took()
        runs.append(sums)
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
