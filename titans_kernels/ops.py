"""The memory as custom ops, which compilation, export and checkpointing take as they are.

Ops are flat: tensors, lists of them and scalars in, new tensors out. `backend` names the module
that computes them, which has `forward`, `backward`, `kept_shapes`, `retrieve`, `retrieve_backward`.
What backward needs beyond the arguments is an output of forward, where `save` is set.

"auto" is Triton where it passes its check, which runs when the op does, outside every graph that is
traced, and else PyTorch. The shapes of what is kept are Triton's either way.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import selfcheck
from .batching import one_by_one
from .kernels import tiles
from .nonfinite import separate
from .packing import Options, Packed, Reading, dense
from .stepping import Projected, Step, StepState, StepWeights
from .transforms import transforming

_PACKED = (
    "Tensor q, Tensor k, Tensor v, Tensor theta, Tensor alpha, Tensor eta, Tensor[] weights, "
    "Tensor[] momentum, Tensor? norm, Tensor bounds, Tensor tail, Tensor query_start"
)
_READING = "Tensor q, Tensor[] weights, Tensor? norm, Tensor cu"
_OPTIONS = "str backend, str activation, bool residual"
_MODULES = {"torch": "chunked", "triton": "kernels", "auto": "kernels"}
_P, _R = len(Packed._fields), len(Reading._fields)
_S = sum(len(part._fields) for part in (Projected, StepWeights, StepState))

Maybe = Tensor | None


def _module(backend: str) -> ModuleType:
    """Triton is imported only where it runs."""
    return importlib.import_module(f".{_MODULES[backend]}.operator", __package__)


def _closed(op: Callable[..., Any]) -> Callable[..., Any]:
    """Autograd and autocast end at an op; kernels are launched on the device of its tensors."""

    @wraps(op)
    def run(q: Tensor, *args: Any) -> Any:
        autocast = torch.autocast(q.device.type, enabled=False)
        with torch.no_grad(), autocast, torch.cuda.device_of(q), _turn():
            return op(q, *args)

    return run


# Triton's interpreter keeps the program that it runs in globals: one thread at a time.
_INTERPRETER = threading.RLock()


def _turn() -> AbstractContextManager[Any]:
    return _INTERPRETER if os.environ.get("TRITON_INTERPRET") == "1" else nullcontext()


def _dense(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _transformed(tensors: Sequence[Tensor], backend: str) -> bool:
    """Whether to compute by PyTorch's own operations, which every transformation goes through.

    A custom op drops the tangents of forward-mode differentiation silently, and `torch.func`
    does not go through its backward.
    """
    if not transforming():
        return False
    duals = (forward_ad.unpack_dual(x).tangent is not None for x in tensors)
    if not torch._C._are_functorch_transforms_active() and not any(duals):
        return False
    if backend == "triton":
        raise RuntimeError(
            f"backend: got {backend!r}, which takes neither the transforms of torch.func nor dual "
            "numbers; those take backend='torch'"
        )
    return True


def _saves(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


# ------------------------------------------------------------------------------------ the memory


def neural_memory(
    packed: Packed, backend: str, options: Options, chunk_size: int, longest: int, final: bool
) -> tuple[Tensor, list[Tensor]]:
    """Outputs [Mq, H, D]; with `final`, W and S at the last whole chunk, [N, H, d_in, d_out]."""
    chunk_size = min(chunk_size, 2**31 - 1)  # kernels count a chunk's tokens in int32
    if _transformed(packed.differentiable(), backend):
        return _module("torch").forward(packed, options, chunk_size, longest, [], final)
    save = _saves(packed.differentiable())
    o, state, _ = _memory(*packed, backend, *options, chunk_size, longest, final, save)
    return o, state


def _kept(packed: Packed, backend: str, chunk_size: int, save: bool) -> list[Tensor]:
    shapes = _module(backend).kept_shapes(packed, chunk_size) if save else []
    return [packed.weights[0].new_zeros(shape) for shape in shapes]


@torch.library.custom_op(
    "titans_kernels::neural_memory",
    mutates_args=(),
    schema=f"({_PACKED}, {_OPTIONS}, str read, SymInt chunk_size, SymInt longest, bool final, "
    "bool save) -> (Tensor o, Tensor[] final, Tensor[] kept)",
)
@_closed
def _memory(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    packed, (backend, *options, chunk_size, longest, final, save) = Packed(*args[:_P]), args[_P:]
    kept, how = _kept(packed, backend, chunk_size, save), (Options(*options), chunk_size, longest)
    clean, nonfinite = separate(packed)
    runs = selfcheck.memory_backend(packed, *how, save) if backend == "auto" else backend
    given_up = backend == "auto" and runs == "torch"
    o, state = _module(runs).forward(clean, *how, [] if given_up else kept, final)
    if given_up:
        for x in kept:  # backward computes its own, and none may pass for Triton's
            x.fill_(torch.nan)
    if nonfinite is not None:
        nonfinite.mark(o, state, chunk_size)
    return o, state, kept


@_memory.register_fake
def _(*args: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    packed, (backend, *_, chunk_size, _, final, save) = Packed(*args[:_P]), args[_P:]
    state = [*packed.weights, *packed.momentum] if final else []
    return _dense(packed.q), list(map(_dense, state)), _kept(packed, backend, chunk_size, save)


@torch.library.custom_op(
    "titans_kernels::neural_memory_backward",
    mutates_args=(),
    schema=f"({_PACKED}, {_OPTIONS}, str read, SymInt chunk_size, SymInt longest, Tensor[] kept, "
    "Tensor do, Tensor[] dfinal) -> Tensor[]",
)
@_closed
def _memory_backward(*args: Any) -> list[Tensor]:
    backend, *options, chunk_size, longest, kept, do, dfinal = args[_P:]
    packed, how = Packed(*args[:_P]), (Options(*options), chunk_size, longest)
    clean, nonfinite = separate(packed)
    runs = selfcheck.memory_backend(packed, *how, True) if backend == "auto" else backend
    if backend == "auto" and runs == "torch":
        kept = _kept(packed, "torch", chunk_size, True)
        _module("torch").forward(clean, *how, kept, False)
    grads = _module(runs).backward(clean, *how, kept, do, dfinal)
    if nonfinite is not None:
        nonfinite.mark_gradients(grads)
    return grads


@_memory_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return list(map(_dense, Packed(*args[:_P]).differentiable()))


def _memory_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    (*_, kept), (*ctx.how, ctx.final, ctx.saved) = output, inputs[_P:]
    # Autograd's own threads know nothing of `using`, and what is kept fits one tile alone.
    ctx.tile = tiles.chosen()
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    _save(ctx, (Packed(*inputs[:_P]), kept))


def _memory_vjp(ctx: Any, do: Maybe, dfinal: list[Maybe], _: Any) -> tuple[Any, ...]:
    if not ctx.saved:
        raise RuntimeError("titans_kernels::neural_memory: save is False, gradients take True")
    packed, kept = _saved(ctx)
    state = [*packed.weights, *packed.momentum]
    d_state = dfinal if ctx.final else [None] * len(state)
    d_o, *d_final = map(_or_zeros, (do, *d_state), (packed.q, *state))
    with tiles.using(ctx.tile):
        grads = _memory_backward(*packed, *ctx.how, kept, d_o, d_final)
    return *_gradients(packed, grads), *[None] * (len(ctx.how) + 2)


def _memory_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    *ctx.how, kept, do, dfinal = inputs[_P:]
    ctx.kept = len(kept)
    _save(ctx, (Packed(*inputs[:_P]), do, dfinal))


def _memory_second(ctx: Any, ddgrads: list[Maybe]) -> tuple[Any, ...]:
    (backend, *options, chunk_size, longest), (packed, do, dfinal) = ctx.how, _saved(ctx)

    def forward(*tensors: Tensor) -> list[Tensor]:
        again = packed.like(list(tensors))
        o, final = _module("torch").forward(again, Options(*options), chunk_size, longest, [], True)
        return [o, *final]

    grads, (ddo, *ddfinal) = _second_vjp(
        backend, forward, packed.differentiable(), [do, *dfinal], ddgrads
    )
    return *_gradients(packed, grads), *[None] * len(ctx.how), [None] * ctx.kept, ddo, ddfinal


torch.library.register_autograd(_memory, _memory_vjp, setup_context=_memory_context)
torch.library.register_autograd(
    _memory_backward, _memory_second, setup_context=_memory_backward_context
)


# -------------------------------------------------------------------------------------- reading


def retrieve(reading: Reading, backend: str, options: Options, longest: int) -> Tensor:
    """Outputs [M, H, D]."""
    if _transformed(reading.differentiable(), backend):
        return _module("torch").retrieve(reading, options, longest)
    return _retrieve(*reading, backend, options.activation, options.residual, longest)


@torch.library.custom_op(
    "titans_kernels::retrieve",
    mutates_args=(),
    schema=f"({_READING}, {_OPTIONS}, SymInt longest) -> Tensor",
)
@_closed
def _retrieve(*args: Any) -> Tensor:
    reading, (backend, *options, longest) = Reading(*args[:_R]), args[_R:]
    how = Options(*options), longest
    runs = selfcheck.reading_backend(reading, *how) if backend == "auto" else backend
    return _module(runs).retrieve(reading, *how)


@_retrieve.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return _dense(q)


@torch.library.custom_op(
    "titans_kernels::retrieve_backward",
    mutates_args=(),
    schema=f"({_READING}, {_OPTIONS}, SymInt longest, Tensor do) -> Tensor[]",
)
@_closed
def _retrieve_backward(*args: Any) -> list[Tensor]:
    reading, (backend, *options, longest, do) = Reading(*args[:_R]), args[_R:]
    how = Options(*options), longest
    runs = selfcheck.reading_backend(reading, *how) if backend == "auto" else backend
    return _module(runs).retrieve_backward(reading, *how, do)


@_retrieve_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    return list(map(_dense, Reading(*args[:_R]).differentiable()))


def _retrieve_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[_R:]
    _save(ctx, Reading(*inputs[:_R]))


def _retrieve_vjp(ctx: Any, do: Tensor) -> tuple[Any, ...]:
    reading = _saved(ctx)
    grads = _retrieve_backward(*reading, *ctx.how, do)
    return *_gradients(reading, grads), *[None] * len(ctx.how)


def _retrieve_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    *ctx.how, do = inputs[_R:]
    _save(ctx, (Reading(*inputs[:_R]), do))


def _retrieve_second(ctx: Any, ddgrads: list[Maybe]) -> tuple[Any, ...]:
    (backend, *options, longest), (reading, do) = ctx.how, _saved(ctx)

    def forward(*tensors: Tensor) -> list[Tensor]:
        return [_module("torch").retrieve(reading.like(list(tensors)), Options(*options), longest)]

    grads, (ddo,) = _second_vjp(backend, forward, reading.differentiable(), [do], ddgrads)
    return *_gradients(reading, grads), *[None] * len(ctx.how), ddo


torch.library.register_autograd(_retrieve, _retrieve_vjp, setup_context=_retrieve_context)
torch.library.register_autograd(
    _retrieve_backward, _retrieve_second, setup_context=_retrieve_backward_context
)


# ------------------------------------------------------------------------------------- decoding


def step(step: Step, backend: str, options: Options, rate: float) -> Tensor:
    """A layer's gated output [N, H D] of one token. Everything in `step.state` is overwritten."""
    (gate, *projected), weight, state = step
    how = options.activation, options.residual, rate
    return _step(gate, *projected, *weight, *state, backend, *how)


@torch.library.custom_op(
    "titans_kernels::step",
    mutates_args=("history", "tokens", "length", "memory"),
    schema="(Tensor gate, Tensor[] streams, Tensor[] gates, Tensor[] filters, Tensor[] biases, "
    "Tensor[] norm, Tensor out_norm, Tensor(a!)[] history, Tensor(b!)[] tokens, Tensor(c!) length, "
    f"Tensor(d!)[] memory, {_OPTIONS}, float rate) -> Tensor",
)
@_closed
def _step(*args: Any) -> Tensor:
    given, (backend, *options, rate) = Step.of(*args[:_S]), args[_S:]
    step = pytree.tree_map(dense, given)  # what is not is copied, and copied back
    how = Options(*options)
    runs = selfcheck.step_backend(step, how) if backend == "auto" else backend
    y = _module(runs).step(step, how, rate)
    states = pytree.tree_leaves(given.state), pytree.tree_leaves(step.state)
    for old, new in zip(*states, strict=True):
        if new is not old:
            old.copy_(new)
    return y


@_step.register_fake
def _(gate: Tensor, *_: Any) -> Tensor:
    return _dense(gate)


# ------------------------------------------------------------------------------ what all share


def _save(ctx: Any, tree: Any) -> None:
    tensors, ctx.spec = pytree.tree_flatten(tree)
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> Any:
    return pytree.tree_unflatten(ctx.saved_tensors, ctx.spec)


def _or_zeros(dx: Maybe, x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format) if dx is None else dx


def _gradients(arguments: Any, grads: list[Maybe]) -> list[Any]:
    """In the places of the arguments; what cannot be differentiated has none."""
    names = ("cu", "bounds", "tail", "query_start")
    none = {name: None for name in names if name in arguments._fields}
    return list(arguments.like(grads)._replace(**none))


one_by_one(_memory_backward)
one_by_one(_retrieve_backward)


def _second_vjp(
    backend: str,
    forward: Callable[..., list[Tensor]],
    inputs: list[Tensor],
    cotangents: list[Tensor],
    ddgrads: list[Maybe],
) -> tuple[list[Maybe], list[Maybe]]:
    """From gradients of `forward`'s gradients to those of its inputs and of its cotangents.

    Through the operations of the PyTorch backend, which autograd can differentiate any further.
    """
    if backend == "triton":
        raise RuntimeError(
            f"backend: got {backend!r}, which takes first derivatives; "
            "second derivatives take backend='torch'"
        )
    again = torch.is_grad_enabled()
    device = inputs[0].device.type
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # Views, so that gradients stop here where one input was made from another.
        x, dy = (
            [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
            for tensors in (inputs, cotangents)
        )
        outputs = [(y, d) for y, d in zip(forward(*x), dy, strict=True) if y.requires_grad]
        if not outputs:  # no tokens, nothing that depends on the inputs
            return [None] * len(x), [None] * len(dy)
        dx = torch.autograd.grad(
            [y for y, _ in outputs],
            x,
            [d for _, d in outputs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        pairs = [
            (d, dd) for d, dd in zip(dx, ddgrads, strict=True) if dd is not None and d.requires_grad
        ]
        found = torch.autograd.grad(
            [d for d, _ in pairs],
            [*x, *dy],
            [dd for _, dd in pairs],
            create_graph=again,
            allow_unused=True,
        )
    return list(found[: len(x)]), list(found[len(x) :])
