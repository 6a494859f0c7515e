"""TNT as its paper writes it (arXiv 2511.07343): a global memory, and local ones that are reset.

    o_t = f(q_t; V_s) + sum_i f(P_t q_t; W^i_t)
    P_t = sum of k_tau k_tau^T / |k_tau|^2

V is read at s, the start of t's global chunk; W^i is what it was at first before every token whose
position is a multiple of reset_every. P sums over the tokens since the last reset (project="shard",
appendix C) or since the start of t's local chunk (project="chunk", equation 7); without a
projection, P = 1. One sequence x [T, dim] without a state. `p` holds the parameters by name, those
of local memory i as "memory.local.i. ...".
"""

import torch
from torch import Tensor

from .blocks import (
    Options,
    Parameters,
    _form,
    _heads,
    _learned_gate,
    _output,
    _persistent,
    _weights,
)
from .memory import ShardState, State, neural_memory


def tnt(
    x: Tensor,
    p: Parameters,
    local_chunks: tuple[int, ...],
    reset_every: int,
    project: str | None,
    options: Options,
) -> tuple[Tensor, list[State | ShardState]]:
    """[T, dim] -> [T, dim], and the memories after it, the global one first.

    `options.chunk_size` is that of the global memory.
    """
    prefix = _persistent(x, p)
    x = torch.cat([prefix, x])
    q, k, v = (_heads(x, p, name, i) for i, name in enumerate("qkv"))
    o, state = _learn(x, q, k, v, p, options, options.chunk_size, "chunk", None)
    states = [state]
    for i, chunk in enumerate(local_chunks):
        own = {name.replace(f"local.{i}.", ""): y for name, y in p.items() if f"local.{i}." in name}
        queries = q if project is None else _project(q, k, reset_every, chunk, project)
        y, state = _learn(x, queries, k, v, own, options, chunk, "token", reset_every)
        o, states = o + y, [*states, state]
    return _output(o, x, p)[len(prefix) :], states


def _learn(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Parameters,
    options: Options,
    chunk_size: int,
    read: str,
    reset_every: int | None,
) -> tuple[Tensor, State | ShardState]:
    """The outputs of one memory for every token, [T, H, D], and its state after the last."""
    theta, alpha, eta = (_learned_gate(x, p, name) for name in ("theta", "alpha", "eta"))
    o, state = neural_memory(
        q[None],
        k[None],
        v[None],
        options.max_learning_rate * theta[None],
        alpha[None],
        eta[None],
        _weights(p),
        **_form(p, options),
        chunk_size=chunk_size,
        read=read,
        reset_every=reset_every,
        output_final_state=True,
    )
    assert state is not None
    return o[0], state


def _project(q: Tensor, k: Tensor, reset_every: int, chunk: int, project: str) -> Tensor:
    """P_t q_t, one token after another."""
    out = []
    for t in range(len(q)):
        position = t % reset_every
        if position == 0 or (project == "chunk" and position % chunk == 0):
            P = q.new_zeros(q.shape[1], q.shape[2], q.shape[2])
        P = P + k[t, :, :, None] * k[t, :, None, :] / (k[t].square().sum(-1) + 1e-6)[:, None, None]
        out.append(torch.einsum("hij,hj->hi", P, q[t]))
    return torch.stack(out)
