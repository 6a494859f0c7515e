"""Where the time of a call goes: PyTorch's profiler, its operations put into a few groups.

Times are the operations' own, without those they call. What no operation accounts for, the
interpreter, autograd's bookkeeping and the profiler's, is the last group. The profiler slows small
operations down, so read shares, and take times from the table of measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from .cases import OURS, Case
from .providers import runner
from .shapes import Shape

PRODUCTS, PYTHON, DISPATCH = "matrix products", "Python and autograd", "views and allocation"
GROUPS = {
    PRODUCTS: "mm bmm addmm baddbmm addbmm dot mv",
    "activations": "sigmoid silu gelu tanh erf exp relu softplus softmax log",
    "elementwise": "add sub rsub mul div neg addcmul addcdiv sqrt rsqrt pow square abs where clamp "
    "clamp_min masked_fill reciprocal lerp eq ne lt le gt ge bitwise_and bitwise_not logical_not",
    "reductions": "sum mean var norm linalg_vector_norm cumsum cumprod amax",
    "indexing and copies": "index index_select index_copy index_add index_put gather scatter "
    "scatter_add cat stack copy clone fill zero repeat arange constant_pad_nd tril triu",
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


@dataclass(frozen=True)
class Share:
    """A group's part in one call."""

    group: str
    seconds: float
    share: float
    calls: float
    flops: float | None = None  # per second, of the matrix products


def group_of(event: str) -> str:
    """The group of a profiler's event, aten::mul_ for example."""
    if not event.startswith("aten::"):
        return PYTHON
    name = event.removeprefix("aten::").lstrip("_").rstrip("_").removesuffix("_backward")
    return GROUP_OF.get(name, DISPATCH)


def breakdown(case: Case, shape: Shape, mode: str, repeats: int = 3) -> list[Share]:
    """Shares of one call of ours, the largest first."""
    run = runner(case.providers[OURS](case.made(shape, shape.T), shape), mode)
    seconds, calls = _profile(run, repeats)
    total = sum(seconds.values())
    flop = case.flop[OURS](shape, mode) if OURS in case.flop else None
    shares = [
        Share(
            group,
            time,
            time / total,
            calls[group],
            flop / time if flop and group == PRODUCTS else None,
        )
        for group, time in seconds.items()
    ]
    return sorted(shares, key=lambda share: -share.seconds)


def _profile(run: Callable[[], Any], repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and operations of each group, per call."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            with record_function("call"):
                run()
    seconds: dict[str, float] = {}
    calls: dict[str, float] = {}
    for event in profiler.key_averages():
        group = group_of(event.key)
        seconds[group] = seconds.get(group, 0.0) + event.self_cpu_time_total / 1e6 / repeats
        calls[group] = calls.get(group, 0.0) + event.count / repeats
    return seconds, calls
