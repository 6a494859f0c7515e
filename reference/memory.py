"""Titans neural memory as the paper writes it (arXiv 2501.00663, eq. 8-15 and 32-33).

The memory is a small network f whose weights W are learned while the sequence is read:

    f(x)  = [x +] [LN](act(... act(x W_1) ...) W_L)
    l_t   = ||f(k_t) - v_t||^2
    g_t   = grad l_t, at the weights with which the chunk of token t starts
    S_t   = eta_t S_{t-1} - theta_t g_t
    W_t   = (1 - alpha_t) W_{t-1} + S_t
    y_t   = f(q_t), at W_t

With read="chunk", queries read the weights with which their chunk starts. With reset_every = S
(TNT, arXiv 2511.07343), before every token at a position that is a multiple of S the memory is
what it was before the first, and its momentum zero; chunks are counted from there.

One sequence after another, one token after another; the heads are independent and
computed in one batched product. Everything is differentiable, the inner gradients included.
Shapes: N sequences, T tokens, H heads of size D, L layers, C = chunk_size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "identity": lambda x: x,
}


Weights = tuple[Tensor, ...]
Row = tuple[Weights, Weights, list[Tensor]]


class State(NamedTuple):
    """The memory at the last whole chunk, and the tokens of the open chunk, padded with zeros."""

    weights: Weights  # L of [N, H, d_in, d_out]
    momentum: Weights  # L of [N, H, d_in, d_out]
    k: Tensor  # [N, C, H, D]
    v: Tensor  # [N, C, H, D]
    theta: Tensor  # [N, C, H] or [N, C, H, L]
    alpha: Tensor  # [N, C, H] or [N, C, H, L]
    eta: Tensor  # [N, C, H] or [N, C, H, L]
    length: Tensor  # int32 [N], tokens in the open chunk: 0 .. C - 1


class ShardState(NamedTuple):
    """The same of a memory with resets."""

    weights: Weights
    momentum: Weights
    k: Tensor
    v: Tensor
    theta: Tensor
    alpha: Tensor
    eta: Tensor
    length: Tensor
    position: Tensor  # int32 [N], tokens since the last reset, 0 .. reset_every
    reset_every: int


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    weights: Weights,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    activation: str = "gelu_tanh",
    residual: bool = True,
    chunk_size: int = 16,
    initial_state: State | ShardState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    read: str = "token",
    reset_every: int | None = None,
) -> tuple[Tensor, State | ShardState | None]:
    """Read a memory at every token while it learns from the tokens so far.

    Args:
        q, k, v: queries, keys, values.
            [B, T, H, D]
        theta, alpha, eta: inner learning rate, forgetting, momentum.
            [B, T, H], or [B, T, H, L] with one gate a layer
        weights: the memory every sequence starts with.
            tuple of L tensors [H, d_in, d_out]
        norm: weight and bias of the LayerNorm inside the memory.
            None or ([H, D], [H, D])
        activation: between the layers.
            "gelu_tanh", "gelu", "silu", "relu" or "identity"
        residual: f(x) = x + ... instead of f(x) = ...
        chunk_size: tokens whose gradients are taken at the same weights.
        initial_state: a state to continue from; `weights` then gives the shapes only.
            None or a State of the N sequences (anything with a State's attributes)
        output_final_state: whether to return the state after the last token.
        cu_seqlens: where the packed sequences begin and end; B is 1, and N sequences.
            None or int [N + 1]
        read: which weights a query reads: those after its token, or those its chunk starts with.
            "token" or "chunk"
        reset_every: tokens after which the memory starts again from `weights`.
            None or int

    Returns:
        (o [B, T, H, D], State or None)

    Example:
        >>> import torch
        >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 10, 2, 4), dim=-1)
        >>> theta, alpha, eta = torch.rand(3, 1, 10, 2) * 0.01
        >>> weights = (torch.randn(2, 4, 16) / 2, torch.randn(2, 16, 4) / 4)
        >>> o, state = neural_memory(
        ...     q, k, v, theta, alpha, eta, weights, chunk_size=4, output_final_state=True
        ... )
        >>> o.shape, state.length
        (torch.Size([1, 10, 2, 4]), tensor([2], dtype=torch.int32))
    """
    f = partial(_memory, norm=norm, activation=ACTIVATIONS[activation], residual=residual)
    sequences = [_sequences(x, cu_seqlens) for x in (q, k, v, theta, alpha, eta)]

    outputs, states = [], []
    for n, (queries, *tokens) in enumerate(zip(*sequences, strict=True)):
        start, age = (weights, tuple(torch.zeros_like(w) for w in weights)), 0
        fresh = start
        if initial_state is not None:
            w_0, s_0, tail = _row(initial_state, n)
            start = w_0, s_0
            tokens = [torch.cat(pair) for pair in zip(tail, tokens, strict=True)]
            if reset_every is not None:
                position = cast(ShardState, initial_state).position
                age = int(position[n]) - len(tail[0])
        replayed = len(tokens[0]) - len(queries)  # tokens of the open chunk: no outputs for them

        y = []
        for t, now in enumerate(_learn(f, tokens, start, chunk_size, fresh, age, reset_every)):
            if t > replayed:
                at = now.anchor if read == "chunk" else now.memory
                y.append(f(queries[t - replayed - 1], at[0]))
        outputs.append(torch.stack(y) if y else torch.zeros_like(queries))
        whole = now.anchor if now.opened else now.memory
        states.append((*whole, [x[len(x) - now.opened :] for x in tokens], now.age))

    o = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return o, _stack(states, chunk_size, reset_every) if output_final_state else None


def retrieve(
    q: Tensor,
    weights_or_state: Weights | State | ShardState,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    activation: str = "gelu_tanh",
    residual: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Read a memory without an update: f(q). A state is read as its last token left it.

    Args:
        q: queries.
            [B, T, H, D]
        weights_or_state: one memory for all sequences, or a state with one a sequence.
            tuple of L tensors [H, d_in, d_out], or a State
        norm, activation, residual, cu_seqlens: as in `neural_memory`.

    Returns:
        o [B, T, H, D]

    Example:
        >>> import torch
        >>> retrieve(torch.ones(1, 3, 2, 4), (torch.zeros(2, 4, 4),)).sum()
        tensor(24.)
    """
    f = partial(_memory, norm=norm, activation=ACTIVATIONS[activation], residual=residual)
    if not hasattr(weights_or_state, "momentum"):
        return f(q, weights_or_state)
    state = cast(State | ShardState, weights_or_state)

    outputs = []
    for n, queries in enumerate(_sequences(q, cu_seqlens)):
        w, s, tail = _row(state, n)
        *_, last = _learn(f, tail, (w, s), chunk_size=state.k.shape[1])
        outputs.append(f(queries, last.memory[0]))
    return torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]


def _memory(
    x: Tensor,
    weights: Weights,
    norm: tuple[Tensor, Tensor] | None,
    activation: Callable[[Tensor], Tensor],
    residual: bool,
) -> Tensor:
    """f(x): [..., H, D] -> [..., H, D], with weights of [H, d_in, d_out]."""
    y = x
    for layer, w in enumerate(weights):
        y = torch.einsum("...hi,hio->...ho", activation(y) if layer else y, w)
    if norm is not None:
        weight, bias = norm
        y = F.layer_norm(y, y.shape[-1:], eps=1e-6) * weight + bias
    return x + y if residual else y


Memory = tuple[Weights, Weights]  # W and S


class _Moment(NamedTuple):
    """Between two tokens of a sequence."""

    memory: Memory
    anchor: Memory  # what the chunk of the last token started with
    opened: int  # tokens in the open chunk
    age: int  # tokens since the last reset


def _learn(
    f: Callable[[Tensor, Weights], Tensor],
    tokens: Sequence[Tensor],
    start: Memory,
    chunk_size: int,
    fresh: Memory | None = None,
    age: int = 0,
    reset_every: int | None = None,
) -> Iterator[_Moment]:
    """Yield what one sequence is after t = 0 .. T tokens; the first token starts a chunk."""

    def loss(
        weights: Weights, k: Tensor, v: Tensor
    ) -> Tensor:  # summed over the heads, whose weights are separate
        return (f(k, weights) - v).square().sum()

    (weights, momentum), opened = start, 0
    yield _Moment(start, start, 0, age)
    for k, v, theta, alpha, eta in zip(*tokens, strict=True):
        if age == reset_every:
            (weights, momentum), opened, age = cast(Memory, fresh), 0, 0
        if opened == 0:
            anchor = weights, momentum
        g = grad(loss)(anchor[0], k, v)
        theta, alpha, eta = (_per_layer(gate, weights) for gate in (theta, alpha, eta))
        momentum = tuple(
            e * s - lr * g for e, s, lr, g in zip(eta, momentum, theta, g, strict=True)
        )
        weights = tuple((1 - a) * w + s for a, w, s in zip(alpha, weights, momentum, strict=True))
        opened, age = (opened + 1) % chunk_size, age + 1
        yield _Moment((weights, momentum), anchor, opened, age)


def _per_layer(gate: Tensor, weights: Weights) -> list[Tensor]:
    """A token's gate, [H] or [H, L], as one [H, 1, 1] a layer."""
    layers = [gate] * len(weights) if gate.dim() == 1 else gate.unbind(-1)
    return [x[:, None, None] for x in layers]


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """The N sequences in x: the rows of a batch, or the pieces of its only row."""
    return x.unbind() if cu_seqlens is None else x[0].split(cu_seqlens.diff().tolist())


def _row(state: State | ShardState, n: int) -> Row:
    """W, S and the open chunk's tokens [k, v, theta, alpha, eta] of sequence n in a state."""
    length = int(state.length[n])
    tokens = [x[n, :length] for x in (state.k, state.v, state.theta, state.alpha, state.eta)]
    return tuple(w[n] for w in state.weights), tuple(s[n] for s in state.momentum), tokens


def _stack(rows: list[Any], chunk_size: int, reset_every: int | None) -> State | ShardState:
    """The State of N sequences: of each what `_row` would give back, and its age."""
    weights, momentum, tokens, ages = zip(*rows, strict=True)
    length = torch.tensor([len(k) for k, *_ in tokens], dtype=torch.int32)

    def pad(x: Tensor) -> Tensor:  # [length, ...] -> [C, ...]
        return torch.cat([x, x.new_zeros(chunk_size - len(x), *x.shape[1:])])

    k, v, theta, alpha, eta = (
        torch.stack([pad(x) for x in xs]) for xs in zip(*tokens, strict=True)
    )
    state = State(
        weights=tuple(torch.stack(w) for w in zip(*weights, strict=True)),
        momentum=tuple(torch.stack(s) for s in zip(*momentum, strict=True)),
        k=k,
        v=v,
        theta=theta,
        alpha=alpha,
        eta=eta,
        length=length.to(k.device),
    )
    if reset_every is None:
        return state
    position = torch.tensor(ages, dtype=torch.int32, device=k.device)
    return ShardState(*state, position, reset_every)
