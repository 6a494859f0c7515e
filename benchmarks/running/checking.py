"""Whether the kernels are right in uninitialised memory: for tuning and for the GPU kit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from titans_kernels import neural_memory, retrieve
from titans_kernels.kernels.tiles import Tile, using

from .cases import leaves
from .providers import Inputs, operator_inputs
from .shapes import Shape

# Of outputs, states and gradients, relative to the PyTorch backend in float64 on the same values,
# in the Frobenius norm. Wide enough for every size: the tests judge by what rounding costs.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Setting:
    """Sizes, and where and how the operators run; `backward`: gradients are taken, too."""

    shape: Shape
    dtype: str = "bfloat16"
    device: str = "cuda"
    depth: int = 2
    backward: bool = False

    def inputs(self, dtype: torch.dtype | None = None, device: str | None = None) -> Inputs:
        """Leaves of the setting's dtype; or the same values of another, elsewhere."""
        drawn = getattr(torch, self.dtype), self.device
        inputs = operator_inputs(self.shape, self.shape.T, *drawn)
        if self.depth == 1:
            D = self.shape.D
            inputs["weights"] = (inputs["weights"][0][..., :D],)
        return leaves(inputs, device or self.device, dtype)


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return empty

    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, filled(getattr(owner, name))))
        yield


def results(setting: Setting, inputs: Inputs, backend: str) -> list[Tensor]:
    """Output, final state, outputs at the first weights, and every gradient if they are taken."""
    options = {"chunk_size": setting.shape.chunk, "backend": backend}
    with torch.set_grad_enabled(setting.backward):
        o, state = neural_memory(**inputs, **options, output_final_state=True)
        assert state is not None
        read = retrieve(inputs["q"], inputs["weights"], norm=inputs["norm"], backend=backend)
        found = [o, read, *state.weights, *state.momentum]
        if setting.backward:
            flat = [x for value in inputs.values() for x in _tuple(value)]
            found += torch.autograd.grad([o.sum() + read.sum()], flat)
    return [x.detach() for x in found]


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def error(setting: Setting, tile: Tile | None = None) -> float:
    """The largest relative error of the kernels with this tile; infinite where there is a NaN."""
    wanted = _wanted(setting)
    with poisoned(), using(tile) if tile else nullcontext():
        found = results(setting, setting.inputs(), "triton")
    errors = [
        float((a.double().cpu() - e).norm() / e.norm()) for a, e in zip(found, wanted, strict=True)
    ]
    return max(x if x == x else float("inf") for x in errors)


def decode_error(setting: Setting) -> float:
    """The same of tokens that come one at a time, behind half a sequence."""
    inputs, chunk = setting.inputs(), setting.shape.chunk
    half, steps = setting.shape.T // 2, min(setting.shape.T // 2, chunk + 4)
    with torch.no_grad():
        exact = setting.inputs(torch.float64, "cpu")
        wanted, _ = neural_memory(**_piece(exact, 0, half + steps), chunk_size=chunk)
        found, state, options = [], None, {"chunk_size": chunk, "backend": "triton"}
        with poisoned():
            for start, stop in pairwise([0, *range(half, half + steps + 1)]):
                piece = _piece(inputs, start, stop) | {"initial_state": state}
                o, state = neural_memory(**piece, **options, output_final_state=True)
                found.append(o)
    got = torch.cat(found, 1).double().cpu()
    worst = float((got - wanted).norm() / wanted.norm())
    return worst if worst == worst else float("inf")


def _piece(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The inputs of tokens start to stop - 1."""
    tokens = ("q", "k", "v", "theta", "alpha", "eta")
    return inputs | {name: inputs[name][:, start:stop] for name in tokens}


@lru_cache(maxsize=1)  # of the setting that is being tuned
def _wanted(setting: Setting) -> list[Tensor]:
    return results(setting, setting.inputs(torch.float64, "cpu"), "torch")


def bound(setting: Setting) -> float:
    return BOUNDS[getattr(torch, setting.dtype)]


def alive(device: str) -> bool:
    """False once an illegal access has taken this process its GPU."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False
