"""Ours, the definition and the peers, each built on given inputs and ready to be called.

A builder takes inputs and a shape and returns a `Task`. It neither times nor prints. A package that
is missing shows as an ImportError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from titans_kernels import NeuralMemory, neural_memory, retrieve
from titans_kernels.layers import neural_memory as layer_module

from .shapes import BOTH, FORWARD, Shape

Inputs = dict[str, Any]  # tensors by name, and tuples of them


class Task(NamedTuple):
    """What is timed: `call` returns the output; `leaves` are what gradients are taken of."""

    call: Callable[[], Tensor]
    leaves: Sequence[Tensor]


RESET = 2048  # tokens

Builder = Callable[[Inputs, Shape], Task]


def runner(task: Task, mode: str) -> Callable[[], Any]:
    """What the timer calls. Backward: of the sum of the output, to every leaf that plays a part."""

    def forward() -> Tensor:
        with torch.no_grad():
            return task.call()

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(task.call().sum(), task.leaves, allow_unused=True)

    return {FORWARD: forward, BOTH: both}[mode]


# ------------------------------------------------------------------------------------------ inputs


def layer_inputs(shape: Shape, length: int, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The first `length` tokens of white noise [B, T, dim]."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = {"generator": generator, "dtype": torch.float64, "device": device}
    x = torch.randn(shape.B, shape.T, shape.dim, **drawn)
    return {"x": x[:, :length].to(dtype).requires_grad_()}


def operator_inputs(shape: Shape, length: int, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The first `length` tokens of unit q, k, v and of gates small enough for a stable memory.

    Only q, k and v are shorter than float32.
    """
    generator = torch.Generator(device).manual_seed(0)
    drawn = {"generator": generator, "dtype": torch.float64, "device": device}
    B, T, H, D = shape.B, shape.T, shape.H, shape.D

    wide = torch.promote_types(dtype, torch.float32)

    def leaf(x: Tensor, dtype: torch.dtype = wide) -> Tensor:
        return x.to(dtype).contiguous().requires_grad_()

    def randn(*size: int) -> Tensor:
        return torch.randn(size, **drawn)

    inputs: Inputs = {
        name: leaf(F.normalize(randn(B, T, H, D), dim=-1)[:, :length], dtype) for name in "qkv"
    }
    for name, largest in (("theta", 0.02), ("alpha", 0.004), ("eta", 0.9)):
        gate = largest * torch.rand(B, T, H, **drawn)
        inputs[name] = leaf(gate[:, :length])
    widths = (D, shape.hidden, D)
    inputs["weights"] = tuple(leaf(randn(H, i, o) / i**0.5) for i, o in pairwise(widths))
    inputs["norm"] = leaf((1 + 0.1 * randn(H, D)) / D**0.5), leaf(0.1 * randn(H, D) / D**0.5)
    return inputs


def leaves_of(inputs: Inputs) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in inputs.values():
        flat += value if isinstance(value, tuple) else [value]
    return flat


# ------------------------------------------------------------------------------------------- ours


def our_operator(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    def call() -> Tensor:
        return neural_memory(**inputs, chunk_size=shape.chunk, backend=backend)[0]

    return Task(call, leaves_of(inputs))


def our_shards(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    """The operator with resets: shards in parallel."""

    def call() -> Tensor:
        options = {"chunk_size": shape.chunk, "reset_every": RESET, "backend": backend}
        return neural_memory(**inputs, **options)[0]

    return Task(call, leaves_of(inputs))


def our_tnt(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    """The two operators of TNT, a global memory that is read at the start of its chunks and a local
    one with resets, without what the layer does around them."""
    whole = {"chunk_size": RESET, "read": "chunk", "backend": backend}
    local = {"chunk_size": shape.chunk, "reset_every": RESET, "backend": backend}

    def call() -> Tensor:
        return neural_memory(**inputs, **whole)[0] + neural_memory(**inputs, **local)[0]

    return Task(call, leaves_of(inputs))


def our_reading(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    """Every q of the memory as it begins."""
    q, weights, norm = (inputs[name] for name in ("q", "weights", "norm"))
    return Task(lambda: retrieve(q, weights, norm=norm, backend=backend), [q, *weights, *norm])


def our_layer(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    x, layer = inputs["x"], _our_layer(inputs, shape, backend)
    return Task(lambda: layer(x)[0], [x, *layer.parameters()])


def our_compiled_layer(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    """Under torch.compile, to which the operator is one operation."""
    x, layer = inputs["x"], _our_layer(inputs, shape, backend)
    run = torch.compile(layer, fullgraph=True, dynamic=False)
    return Task(lambda: run(x)[0], [x, *layer.parameters()])


def our_step(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    """The last token, after all others."""
    x, layer = inputs["x"], _our_layer(inputs, shape, backend)
    with torch.no_grad():
        _, state = layer(x[:, :-1])
    return Task(lambda: layer.step(x[:, -1], state)[0], [])


def our_step_in_place(inputs: Inputs, shape: Shape, backend: str = "torch") -> Task:
    """The same into the old state's tensors; what a step in mid-chunk changes is put back."""
    x, layer = inputs["x"], _our_layer(inputs, shape, backend)
    with torch.no_grad():
        _, state = layer(x[:, :-1])
    changed = [state.memory.length, *state.convolution]
    before = [y.clone() for y in changed]

    def call() -> Tensor:
        for new, old in zip(changed, before, strict=True):
            new.copy_(old)
        return layer.step(x[:, -1], state, inplace=True)[0]

    return Task(call, [])


def _our_layer(inputs: Inputs, shape: Shape, backend: str = "torch") -> NeuralMemory:
    def build() -> NeuralMemory:
        return NeuralMemory(
            shape.dim,
            heads=shape.H,
            dim_head=shape.D,
            expansion=shape.expansion,
            chunk_size=shape.chunk,
            backend=backend,
        )

    return _seeded(build).to(inputs["x"])


def _seeded(build: Callable[[], Any]) -> Any:
    """The same parameters for every dtype, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


# ------------------------------------------------------------------------------------- definition


def defined_operator(inputs: Inputs, shape: Shape) -> Task:
    def call() -> Tensor:
        return reference.neural_memory(**inputs, chunk_size=shape.chunk)[0]

    return Task(call, leaves_of(inputs))


def defined_reading(inputs: Inputs, shape: Shape) -> Task:
    q, weights, norm = (inputs[name] for name in ("q", "weights", "norm"))
    return Task(lambda: reference.retrieve(q, weights, norm=norm), [q, *weights, *norm])


def defined_layer(inputs: Inputs, shape: Shape) -> Task:
    """Our layer's projections and convolutions, and the definition of the memory between them."""
    x, layer = inputs["x"], _our_layer(inputs, shape)

    def memory(*args: Any, backend: str, **kwargs: Any) -> tuple[Tensor, Any]:
        return reference.neural_memory(*args, **kwargs)

    def call() -> Tensor:
        with mock.patch.object(layer_module, "neural_memory", memory):
            return layer(x)[0]

    return Task(call, [x, *layer.parameters()])


def defined_step(inputs: Inputs, shape: Shape) -> Task:
    task = defined_layer(inputs, shape)
    return Task(lambda: task.call()[:, -1], [])


# ------------------------------------------------------------------------------------------ peers


def titans_pytorch_layer(inputs: Inputs, shape: Shape) -> Task:
    """Its default: updates, momentum and decay once a chunk, cheaper than the paper's."""
    layer = _titans_pytorch(inputs, shape, chunk_size=shape.chunk)
    return Task(lambda: layer(inputs["x"])[0], [inputs["x"], *layer.parameters()])


def titans_pytorch_paper_layer(inputs: Inputs, shape: Shape) -> Task:
    """The paper's form: gates and an update per token, gradients anchored every `batch_size`."""
    layer = _titans_pytorch(inputs, shape, chunk_size=1, batch_size=shape.chunk)
    return Task(lambda: layer(inputs["x"])[0], [inputs["x"], *layer.parameters()])


def titans_pytorch_step(inputs: Inputs, shape: Shape) -> Task:
    x, layer = inputs["x"], _titans_pytorch(inputs, shape, chunk_size=shape.chunk)
    with torch.no_grad():
        _, state = layer(x[:, :-1])
    return Task(lambda: layer(x[:, -1:], state=state)[0], [])


def _titans_pytorch(inputs: Inputs, shape: Shape, **chunks: int) -> nn.Module:
    import titans_pytorch

    def build() -> nn.Module:
        return titans_pytorch.NeuralMemory(
            dim=shape.dim,
            heads=shape.H,
            dim_head=shape.D,
            model=titans_pytorch.MemoryMLP(
                dim=shape.D, depth=2, expansion_factor=float(shape.expansion)
            ),
            **chunks,
        )

    return _seeded(build).to(inputs["x"])


def attention_leaves(inputs: Inputs) -> list[Tensor]:
    return [inputs[name] for name in "qkv"]


def attention(inputs: Inputs, shape: Shape) -> Task:
    """Causal softmax attention on the same q, k and v: another model, for scale."""
    q, k, v = attention_leaves(inputs)

    def call() -> Tensor:
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return o.transpose(1, 2)

    return Task(call, [q, k, v])
