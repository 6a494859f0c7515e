"""Peak memory of one call. On a CPU: how far its process grows beyond what it is built of.

Every provider and mode has a process of its own, forked from a server that has imported the
packages and done nothing else. It builds the provider and its inputs, makes one call on a short
prefix (which loads code and fills caches), gives freed pages back to the system, and then counts:
the resident set just before the call, and its highest value during the call (VmHWM, set back
through /proc/self/clear_refs). The difference is what the call needs on top of parameters and
inputs: activations, what autograd saves, gradients, the output, and the slack of the allocator and
of the libraries under it. Where there is no such file, the highest resident set since the process
began takes both places (getrusage); that may count less, never more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .providers import runner
from .shapes import Shape

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_growth(case: Case, provider: str, shape: Shape, mode: str, threads: int) -> int:
    """Bytes, measured in a process of its own; on a GPU, what its allocator says."""
    if case.device != "cpu":
        return _allocated(case, provider, shape, mode)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.running.harness", "titans_pytorch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_measure, case, provider, shape, mode, threads).result()


def _measure(case: Case, provider: str, shape: Shape, mode: str, threads: int) -> int:
    torch.set_num_threads(threads)
    build = case.providers[provider]

    def prepared(length: int) -> Callable[[], Any]:
        return runner(build(case.made(shape, length), shape), mode)

    prepared(shape.checked)()
    return growth(prepared(shape.T))


def growth(run: Callable[[], Any]) -> int:
    """Bytes by which this process grows in one call, on a CPU."""
    gc.collect()
    _give_back()
    before = _restart()
    result = run()
    grown = _highest() - before
    del result
    return max(grown, 0)


def _allocated(case: Case, provider: str, shape: Shape, mode: str) -> int:
    run = runner(case.providers[provider](case.made(shape, shape.T), shape), mode)
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def _give_back() -> None:
    """Return freed pages to the system (glibc): a call that reuses them would not seem to grow."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _restart() -> int:
    """Forget the highest resident set so far; bytes that are resident now."""
    with contextlib.suppress(OSError):
        RESET.write_text("5")
    return _highest()


def _highest() -> int:
    """Bytes of the highest resident set."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
