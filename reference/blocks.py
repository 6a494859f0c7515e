"""The Titans architectures as the paper writes them (arXiv 2501.00663, section 4, eq. 21-31).

One sequence x [T, dim] at a time, without a state: one token after another in attention, one
segment after another in MAC. `p` holds the parameters of a block by name, as PyTorch's
`named_parameters` lists them; sizes, depth and what a memory has besides are read off them.

    LMM  o = M([p | x])
    MAC  h_t = M*_{t-1}(q_t);  y_t = Attn([p | h_t | S_t]);  M_t = M_{t-1}(y_t);  o = y ⊗ M*_t(y_t)
    MAG  o = SW-Attn*([p | x]) ⊗ M([p | x])
    MAL  o = SW-Attn(M([p | x]))
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .memory import ShardState, State, neural_memory, retrieve

Parameters = Mapping[str, Tensor]


class Options(NamedTuple):
    """What the parameters do not tell."""

    chunk_size: int = 16
    activation: str = "gelu_tanh"
    residual: bool = True
    max_learning_rate: float = 0.1
    rotary: bool = True


def lmm(x: Tensor, p: Parameters, options: Options) -> Tensor:
    """The memory alone."""
    prefix = _persistent(x, p)
    return _memory(torch.cat([prefix, x]), p, options)[len(prefix) :]


def mag(x: Tensor, p: Parameters, window: int, options: Options) -> Tensor:
    """Memory as a gate, eq. 26-28."""
    y = _sliding_window(x, p, window, _persistent(x, p), options)
    return _gate(y, lmm(x, p, options), p)


def mal(x: Tensor, p: Parameters, window: int, options: Options) -> Tensor:
    """Memory as a layer, eq. 29-31."""
    prefix = _persistent(x, p)
    y = _memory(torch.cat([prefix, x]), p, options)
    return _sliding_window(y, p, window, x[:0], options)[len(prefix) :]


def mac(x: Tensor, p: Parameters, segment: int, options: Options) -> Tensor:
    """Memory as context, eq. 21-25. Tokens see no later token, nor what it has retrieved."""
    prefix = _persistent(x, p)
    queries = _heads(x, p, "q", 0)  # of the whole sequence: a convolution has no segments
    y, m, state = x[:0], x[:0], None
    for start in range(0, len(x), segment):
        S = x[start : start + segment]
        known = _weights(p) if state is None else state
        read = retrieve(queries[None, start : start + segment], known, **_form(p, options))
        h = _output(read[0], S, p)

        y_t = []
        for i in range(len(S)):
            context = torch.cat([h[: i + 1], S[: i + 1]])
            distance = [i - j for j in range(i + 1)] * 2
            y_t.append(_attention(S[i], context, distance, prefix, p, options))
        y = torch.cat([y, torch.stack(y_t)])

        o, state = _learn([z[:, start:] for z in _inputs(y, p, options)], p, options, state)
        m = torch.cat([m, _output(o[0], y[start:], p)])
    return _gate(y, m, p)


# The memory between its projections.


def _memory(x: Tensor, p: Parameters, options: Options) -> Tensor:
    """M(x): the memory's output for every token, after the updates of the tokens up to it."""
    o, _ = _learn(_inputs(x, p, options), p, options, None)
    return _output(o[0], x, p)


def _learn(
    inputs: list[Tensor], p: Parameters, options: Options, state: State | ShardState | None
) -> tuple[Tensor, State | ShardState | None]:
    q, k, v, theta, alpha, eta = inputs
    return neural_memory(
        *(q, k, v, theta, alpha, eta, _weights(p)),
        **_form(p, options),
        chunk_size=options.chunk_size,
        initial_state=state,
        output_final_state=True,
    )


def _inputs(x: Tensor, p: Parameters, options: Options) -> list[Tensor]:
    """q, k, v [1, T, H, D] and theta, alpha, eta [1, T, H] or [1, T, H, L]."""
    theta, alpha, eta = (_learned_gate(x, p, name) for name in ("theta", "alpha", "eta"))
    heads = [_heads(x, p, name, i) for i, name in enumerate("qkv")]
    return [y[None] for y in (*heads, options.max_learning_rate * theta, alpha, eta)]


def _heads(x: Tensor, p: Parameters, name: str, i: int) -> Tensor:
    """Queries, keys or values: a projection, a causal convolution, SiLU, unit length."""
    y = x @ p[f"memory.{name}_proj.weight"].T
    if f"memory.convolutions.{i}.weight" in p:
        taps = p[f"memory.convolutions.{i}.weight"]
        before = y.new_zeros(taps.shape[1] - 1, y.shape[1])
        past = torch.cat([before, y])
        y = torch.stack([(past[t : t + taps.shape[1]] * taps.T).sum(0) for t in range(len(y))])
    H, D, _ = p["memory.weights.0"].shape
    y = (y * torch.sigmoid(y)).reshape(-1, H, D)
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _learned_gate(x: Tensor, p: Parameters, name: str) -> Tensor:
    H, bias = len(p["memory.weights.0"]), p[f"memory.{name}_bias"]
    gate = torch.sigmoid(x @ p[f"memory.{name}_proj.weight"].T + bias)
    return gate if len(bias) == H else gate.reshape(len(x), H, -1)


def _output(o: Tensor, x: Tensor, p: Parameters) -> Tensor:
    """What the memory read, [T, H, D], normalised, gated by x and projected: [T, dim]."""
    o = (_rms(o) * p["memory.out_norm"]).flatten(1)
    g = x @ p["memory.gate_proj.weight"].T
    return (o * g * torch.sigmoid(g)) @ p["memory.out_proj.weight"].T


def _weights(p: Parameters) -> tuple[Tensor, ...]:
    depth = sum(name.startswith("memory.weights.") for name in p)
    return tuple(p[f"memory.weights.{i}"] for i in range(depth))


def _form(p: Parameters, options: Options) -> dict[str, Any]:
    """What the memory's network is besides its weights."""
    norm = None
    if "memory.norm_weight" in p:
        norm = p["memory.norm_weight"], p["memory.norm_bias"]
    return {"norm": norm, "activation": options.activation, "residual": options.residual}


# Attention, one query at a time.


def _sliding_window(
    x: Tensor, p: Parameters, window: int, prefix: Tensor, options: Options
) -> Tensor:
    """Every token sees the prefix, itself and the window - 1 tokens before it."""
    y = [x[:0]]
    for t in range(len(x)):
        first = max(0, t - window + 1)
        distance = [t - s for s in range(first, t + 1)]
        y.append(_attention(x[t], x[first : t + 1], distance, prefix, p, options)[None])
    return torch.cat(y)


def _attention(
    x: Tensor,
    context: Tensor,
    distance: list[int],
    prefix: Tensor,
    p: Parameters,
    options: Options,
) -> Tensor:
    """What token x [dim] sees of a context at given distances, and of a prefix at none: [dim]."""
    H = len(p["memory.weights.0"])

    def project(name: str, x: Tensor) -> Tensor:
        return (x @ p[f"attention.{name}_proj.weight"].T).unflatten(-1, (H, -1))

    q = project("q", x)  # [H, D]
    turned = _turn(q, torch.tensor(distance)) if options.rotary else q
    k, seen = project("k", context), torch.cat([prefix, context])
    scores = torch.cat([(q * project("k", prefix)).sum(-1), (turned * k).sum(-1)])  # [K, H]
    weights = torch.softmax(scores * q.shape[-1] ** -0.5, 0)
    o = (weights[..., None] * project("v", seen)).sum(0)
    return o.flatten() @ p["attention.out_proj.weight"].T


def _turn(q: Tensor, distance: Tensor) -> Tensor:
    """q [H, D] as seen from so many tokens before it, [K]: pairs rotated, as complex numbers."""
    a, b = q.chunk(2, -1)
    frequency = 10_000.0 ** (-torch.arange(a.shape[-1], dtype=q.dtype) / a.shape[-1])
    angle = distance[:, None, None] * frequency
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


# What combines them.


def _gate(y: Tensor, m: Tensor, p: Parameters) -> Tensor:
    """y ⊗ m."""
    gate = torch.sigmoid(_rms(m) * p["gate.memory_norm"])
    return _rms(y) * p["gate.attention_norm"] * gate


def _rms(x: Tensor) -> Tensor:
    return x / ((x.square().sum(-1, keepdim=True) + 1e-6) / x.shape[-1]).sqrt()


def _persistent(x: Tensor, p: Parameters) -> Tensor:
    return p["persistent"] if "persistent" in p else x[:0]
