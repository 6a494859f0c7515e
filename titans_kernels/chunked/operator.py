"""The operators on the PyTorch backend. On a GPU each waits for it once, for the lengths."""

from __future__ import annotations

from torch import Tensor

from ..packing import Options, Packed, Reading, known
from ..stepping import Step
from ..transforms import values
from . import layout
from .layout import Layout, block_size
from .recall import recall, recall_backward
from .scan import Checkpoints, run, run_backward
from .step import finish, prepare


def _layout(packed: Packed, chunk_size: int) -> Layout:
    block = block_size(chunk_size, packed.q.device)
    return Layout.of(packed.bounds, packed.tail, packed.query_start, chunk_size, block)


def kept_shapes(packed: Packed, chunk_size: int) -> list[tuple[int, ...]]:
    """Of what forward keeps for backward, see `scan.Checkpoints`."""
    block = block_size(chunk_size, packed.q.device)
    rows = layout.checkpoints(packed.k.shape[0], chunk_size, block)
    tables = [(rows, w.shape[1], 2, *w.shape[2:]) for w in packed.weights]
    return tables if block.blocks == 1 else tables * 2


def forward(
    packed: Packed,
    options: Options,
    chunk_size: int,
    longest: int,
    kept: list[Tensor],
    final: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and with `final` the final state; fills in what is to be kept for backward."""
    checkpoints = Checkpoints(kept, len(packed.weights)) if kept else None
    return run(packed, _layout(packed, chunk_size), options, checkpoints, final)


def backward(
    packed: Packed,
    options: Options,
    chunk_size: int,
    longest: int,
    kept: list[Tensor],
    do: Tensor,
    dfinal: list[Tensor],
) -> list[Tensor]:
    """Gradients of `packed.differentiable()`."""
    checkpoints = Checkpoints(kept, len(packed.weights))
    return run_backward(packed, checkpoints, _layout(packed, chunk_size), options, do, dfinal)


def retrieve(reading: Reading, options: Options, longest: int) -> Tensor:
    return recall(reading, options)


def retrieve_backward(reading: Reading, options: Options, longest: int, do: Tensor) -> list[Tensor]:
    """Gradients of `reading.differentiable()`."""
    return recall_backward(reading, options, do)


def step(step: Step, options: Options, rate: float) -> Tensor:
    """A layer's gated output [N, H D] of one token; its state goes on in place."""
    chunk_size = step.state.tokens[0].shape[1]
    packed = prepare(step, rate)
    ends = not known(packed.tail) or chunk_size - 1 in values(packed.tail)
    o, final = forward(packed, options, chunk_size, chunk_size, [], ends)
    for old, new in zip(step.state.memory, final, strict=ends):
        old.copy_(new)
    return finish(step, o, packed.tail)
