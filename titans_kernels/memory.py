"""The operators: one way in, checked once, whichever backend runs them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from . import checks, ops
from .backends import choose
from .packing import (
    Options,
    Reading,
    accumulator,
    ends_chunk,
    one_each,
    pack,
    pack_norm,
    pack_open_chunks,
    rows,
    segments,
    unpack,
)
from .shards import restart, shard
from .state import MemoryState


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    alpha: Tensor,
    eta: Tensor,
    weights: tuple[Tensor, ...],
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    activation: checks.Activation = "gelu_tanh",
    residual: bool = True,
    chunk_size: int = 16,
    initial_state: MemoryState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    read: checks.Read = "token",
    reset_every: int | None = None,
    backend: checks.Backend = "auto",
) -> tuple[Tensor, MemoryState | None]:
    """Titans' neural memory: a small MLP, trained on keys and values as they are read.

    The memory of every head is `f(x) = [x +] [LN](act(... act(x W_1) ...) W_L)`. Token t's
    surprise is the gradient of its loss, taken at the weights with which its chunk starts (arXiv
    2501.00663, equations 8-15 and section 3.2):

        g_t = grad_W ||f(k_t) - v_t||^2
        S_t = eta_t S_{t-1} - theta_t g_t
        W_t = (1 - alpha_t) W_{t-1} + S_t
        o_t = f(q_t; W_t)

    Args:
        q, k, v (Tensor):
            [B, T, H, D] of one dtype: float64, float32, bfloat16 or float16.
        theta (Tensor):
            [B, T, H], or [B, T, H, L] for one per memory layer: inner learning rate, at least 0.
        alpha (Tensor):
            The same shape: forgetting, in [0, 1]. 1 forgets everything before the token.
        eta (Tensor):
            The same shape: momentum, in [0, 1].
        weights (tuple[Tensor, ...]):
            L tensors [H, d_in, d_out] from D to D, the memory that every sequence starts with.
        norm (tuple[Tensor, Tensor] | None):
            Weight and bias, [H, D] each, of a LayerNorm (eps 1e-6) inside the memory. Default:
            None.
        activation (str):
            Between the layers: "gelu_tanh", "gelu" (erf), "silu", "relu" or "identity".
        residual (bool):
            Whether f adds its input. Default: True.
        chunk_size (int):
            Tokens that share the weights their gradients are taken at. Semantics, not a tuning
            knob: a model is run with the chunk it was trained with. Any with
            output_final_state=False; a state holds chunk_size tokens of every sequence, at most
            65,536. Default: 16.
        initial_state (MemoryState | None):
            What B sequences (N with cu_seqlens) continue from; `weights` then gives shapes only
            and has a zero gradient, but where resets return to it. Made with the same
            reset_every.
        output_final_state (bool):
            Whether to return the state. Default: False.
        cu_seqlens (Tensor | None):
            [N + 1] int32 or int64, 0 first and T last: sequences packed end to end in a batch of 1.
        read (str):
            "token": a query reads the weights after its own token, as above. "chunk": those with
            which its chunk starts, as the global memory of TNT (arXiv 2511.07343) does. Default:
            "token".
        reset_every (int | None):
            Before every token at a position that is a multiple of it, counted from the start of
            its sequence, the memory returns to `weights` and its momentum to zero, and chunks are
            counted from there: the local memories of TNT. What lies between two resets, a shard,
            depends on nothing before it, and all of them are computed in parallel. `weights` has
            the gradient of every shard that starts with it. Default: None, no resets.
        backend (str):
            "torch", "triton" or "auto". One that is named never falls back to another. "auto" is
            Triton on a GPU where it covers the case and has passed its check there, else PyTorch.
            See below. Default: "auto".

    Returns:
        (o, state): o is [B, T, H, D] in q's dtype; state is None without output_final_state. Passed
        on as `initial_state` it continues exactly, wherever the sequence was cut, gradients
        included. One token costs a pass over its open chunk, at most chunk_size tokens; with
        read="chunk" and without gradients, where lengths are known on a CPU, only the last of
        a chunk does.

    With "auto" the kernels check themselves on the GPU that they run on, when a configuration (GPU,
    versions, sizes, dtypes, options, with or without gradients) is first met: forward and backward
    on a small problem, compared with the PyTorch backend in float64 by the bounds of `python -m
    titans_kernels.verify`. What passes is used, and remembered in $TITANS_KERNELS_CACHE, by default
    the user's cache folder (~/.cache/titans_kernels on Linux). What fails gives one RuntimeWarning,
    and PyTorch runs. `warmup` checks ahead; before the capture of a CUDA graph that is necessary.
    TITANS_KERNELS_AUTO=triton leaves the check out, =torch makes "auto" PyTorch, =check is the
    default. The logger "titans_kernels" reports at level INFO what runs and why.

    For gradients it keeps W and S of every 2,048th token of a sequence (Triton) or every 256th to
    512th (PyTorch), which is 128 or at most 1,024 bytes a token and head at D 64 and hidden 256,
    and recomputes what lies between, so many tokens at a time.

    `torch.compile(fullgraph=True)` and `torch.export` take it, once for all lengths; cu_seqlens is
    not looked at there. `torch.onnx.export` does not support it and raises. Under autocast it
    computes as outside. Checkpointing takes `use_reentrant=False`: the other kind drops gradients
    that flow through the state alone. The PyTorch backend has derivatives of any order, in forward
    mode too, and takes the transforms of `torch.func`; Triton's refuses both.

    A NaN or an infinity is causal: in q it reaches its own output, in k, v or a gate those from its
    token on, of its sequence and head, and the state. Gradients that depend on it are not finite.
    Weights that diverge from finite inputs until they overflow, and the transforms of `torch.func`,
    may make outputs non-finite from the start of their block on, up to 128 tokens earlier.

    Raises:
        TypeError, ValueError: an argument that does not fit: its name, what it got, what it takes.

    Examples:
        >>> import torch
        >>> from titans_kernels import neural_memory
        >>> q, k, v = torch.nn.functional.normalize(torch.randn(3, 1, 100, 2, 8), dim=-1)
        >>> theta, alpha, eta = 0.01 * torch.rand(3, 1, 100, 2)
        >>> weights = torch.randn(2, 8, 32) / 8**0.5, torch.randn(2, 32, 8) / 32**0.5
        >>> o, state = neural_memory(q, k, v, theta, alpha, eta, weights, output_final_state=True)
        >>> o.shape, state.length
        (torch.Size([1, 100, 2, 8]), tensor([4], dtype=torch.int32))
    """
    checks.tokens(q, k, v)
    checks.weights("weights", weights, q.shape[2], q.shape[3], q)
    checks.gates(q, len(weights), theta=theta, alpha=alpha, eta=eta)
    checks.norm(norm, q)
    checks.choice("activation", activation, checks.ACTIVATIONS)
    checks.boolean("residual", residual)
    checks.boolean("output_final_state", output_final_state)
    checks.integer("chunk_size", chunk_size, 1)
    checks.choice("read", read, checks.READS)
    if reset_every is not None:
        checks.integer("reset_every", reset_every, 1)
    if output_final_state:
        checks.state_rows("chunk_size", chunk_size)
    checks.cu_seqlens(cu_seqlens, q)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shapes = [tuple(w.shape[1:]) for w in weights]
        checks.state("initial_state", initial_state, q, shapes, sequences, theta.dim())
        if initial_state.chunk_size != chunk_size:
            raise ValueError(
                f"initial_state: got chunks of {initial_state.chunk_size} tokens, "
                f"takes chunk_size = {chunk_size}"
            )
        checks.same_resets("initial_state", initial_state, reset_every)
        if reset_every is not None:
            initial_state = restart(initial_state, tuple(weights), q.shape[1], cu_seqlens)
    packed, longest = pack(
        q, k, v, (theta, alpha, eta), tuple(weights), norm, initial_state, cu_seqlens
    )
    chosen = choose(backend, packed.k, packed.weights)
    options = Options(activation, residual, read)
    moves = initial_state is None or ends_chunk(initial_state, q.shape[1], cu_seqlens)
    in_chunks = initial_state is not None and one_each(q, cu_seqlens)
    shards, position = None, None
    if reset_every is not None and in_chunks:  # one token each: no sequence has a second shard
        assert initial_state is not None and initial_state.position is not None
        position = initial_state.position + 1
    elif reset_every is not None:
        shards = shard(packed, tuple(weights), initial_state, q.shape[1], cu_seqlens, reset_every)
        packed, position = shards.packed, shards.position
        longest, moves = torch.sym_min(longest, reset_every), True
    final: list[Tensor] = []
    if read == "chunk" and not moves and not torch.is_grad_enabled():
        # Every query reads the weights that its sequence has: nothing of the open chunk is needed.
        cu, most = segments(q, cu_seqlens)
        o = ops.retrieve(Reading(packed.q, packed.weights, packed.norm, cu), chosen, options, most)
    else:
        final_too = output_final_state and moves
        o, final = ops.neural_memory(packed, chosen, options, chunk_size, longest, final_too)
    o = o.view(q.shape)
    if not output_final_state:
        return o, None
    if shards is not None:
        packed, final = shards.ends(final)
    state = unpack(packed, final, chunk_size, theta.shape[2:], in_chunks)
    return o, dataclasses.replace(state, position=position, reset_every=reset_every)


def retrieve(
    q: Tensor,
    weights_or_state: tuple[Tensor, ...] | MemoryState,
    *,
    norm: tuple[Tensor, Tensor] | None = None,
    activation: checks.Activation = "gelu_tanh",
    residual: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: checks.Backend = "auto",
) -> Tensor:
    """A forward pass of the memory without an update: `o_t = f(q_t; W)` (arXiv 2501.00663, eq. 15).

    Args:
        q (Tensor):
            [B, T, H, D].
        weights_or_state (tuple[Tensor, ...] | MemoryState):
            L tensors [H, d_in, d_out] that all sequences share; or a state of B sequences (N with
            cu_seqlens), read as it is after its last token, those of the open chunk included.
        norm, activation, residual, cu_seqlens, backend:
            As in `neural_memory`.

    Returns:
        o, [B, T, H, D] in q's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit: its name, what it got, what it takes.

    Examples:
        >>> import torch
        >>> from titans_kernels import retrieve
        >>> weights = torch.randn(2, 8, 32) / 8**0.5, torch.randn(2, 32, 8) / 32**0.5
        >>> retrieve(torch.randn(1, 5, 2, 8), weights).shape
        torch.Size([1, 5, 2, 8])
    """
    checks.queries(q)
    shape = q.shape
    checks.norm(norm, q)
    checks.choice("activation", activation, checks.ACTIVATIONS)
    checks.boolean("residual", residual)
    checks.cu_seqlens(cu_seqlens, q)
    if isinstance(weights_or_state, MemoryState):
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        checks.state("weights_or_state", weights_or_state, q, None, sequences, None)
    else:
        checks.weights("weights_or_state", weights_or_state, q.shape[2], q.shape[3], q)
    options = Options(activation, residual)
    if isinstance(weights_or_state, MemoryState):
        weights = _after_tail(weights_or_state, norm, options, backend)
    else:
        weights = [w.to(accumulator(q)).unsqueeze(0) for w in weights_or_state]
        q, cu_seqlens = q.reshape(1, -1, *q.shape[2:]), None  # all tokens read the same weights
    cu, longest = segments(q, cu_seqlens)
    reading = Reading(rows(q), weights, pack_norm(norm, accumulator(q)), cu)
    chosen = choose(backend, reading.q, weights)
    return ops.retrieve(reading, chosen, options, longest).view(shape)


def _after_tail(
    state: MemoryState,
    norm: tuple[Tensor, Tensor] | None,
    options: Options,
    backend: str,
) -> list[Tensor]:
    """The weights after a state's last token, the open chunk's updates included."""
    packed, C = pack_open_chunks(state, norm), state.chunk_size
    chosen = choose(backend, packed.k, packed.weights)
    _, final = ops.neural_memory(packed, chosen, options, C, C, True)
    return final[: len(packed.weights)]
