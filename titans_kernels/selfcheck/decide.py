"""Which backend a call with `backend="auto"` runs on, decided once a configuration."""

from __future__ import annotations

import logging
import os
import threading
import time
import warnings

import torch

from .. import checks
from ..packing import Options, Packed, Reading
from ..stepping import Step
from . import records
from .check import check
from .configuration import Configuration

CHECK, TRITON, TORCH = "check", "triton", "torch"
MODES = CHECK, TRITON, TORCH

log = logging.getLogger("titans_kernels")
_decided: dict[Configuration, str] = {}
_lock = threading.RLock()


def mode() -> str:
    """$TITANS_KERNELS_AUTO: what "auto" means where the kernels cover a case."""
    value = os.environ.get("TITANS_KERNELS_AUTO", CHECK)
    checks.choice("TITANS_KERNELS_AUTO", value, MODES)
    return value


def memory_backend(
    packed: Packed, options: Options, chunk_size: int, longest: int, gradients: bool
) -> str:
    """ "triton" or "torch", for a call that the kernels cover."""
    configuration = Configuration.of_memory(packed, options, chunk_size, longest, gradients)
    return _backend(configuration, packed.q.shape[1], packed.q.device)


def reading_backend(reading: Reading, options: Options, longest: int) -> str:
    """The same for queries alone."""
    configuration = Configuration.of_reading(reading, options, longest)
    return _backend(configuration, reading.q.shape[1], reading.q.device)


def step_backend(step: Step, options: Options) -> str:
    """The same for a decoded token of a layer."""
    k = step.state.tokens[0]
    return _backend(Configuration.of_step(step, options), k.shape[2], k.device)


def forget() -> None:
    """Decide anew, as a new process would."""
    with _lock:
        _decided.clear()


def _backend(configuration: Configuration, heads: int, device: torch.device) -> str:
    """Final for this process: a backward pass goes the way of its forward pass."""
    found = _decided.get(configuration)
    if found is not None:
        return found
    with _lock:
        if configuration not in _decided:
            backend, reason = _decide(configuration, heads, device)
            log.info("%s: %s, %s", configuration, backend, reason)
            _decided[configuration] = backend
        return _decided[configuration]


def _decide(configuration: Configuration, heads: int, device: torch.device) -> tuple[str, str]:
    """The backend, and why."""
    chosen = mode()
    if chosen != CHECK:
        return chosen, f"as TITANS_KERNELS_AUTO={chosen} says"
    if records.read(configuration):
        return TRITON, f"which has passed its check before ({records.path(configuration)})"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"backend: got 'auto' inside the capture of a CUDA graph for {configuration}, which "
            "has not been checked yet; takes a call of these sizes before the capture, or "
            "titans_kernels.warmup, or a backend that is named"
        )
    start = time.perf_counter()
    failure: object
    try:
        failure = check(configuration, heads, device)
    except Exception as error:  # whatever a compiler or a driver raises
        failure = f"{type(error).__name__}: {error}"
    if failure is None:
        records.write(configuration)
        seconds = time.perf_counter() - start
        return TRITON, f"which has passed its check now, in {seconds:.1f} s with its compilation"
    warnings.warn(
        f"titans_kernels: the Triton kernels failed their check and are not used: {failure} "
        f"({configuration}; torch {configuration.torch}, Triton {configuration.triton}). The "
        "PyTorch backend runs instead, which is slower. Please report this with the output of "
        "`python -m titans_kernels.verify`",
        RuntimeWarning,
        stacklevel=2,
    )
    return TORCH, "as Triton has failed its check"
