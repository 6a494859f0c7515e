"""The memory as a network, on tiles: activation, output head and error, for all passes.

Tiles are transposed, [width, tokens]: Hopper's tensor cores want 64 rows, a chunk has 16 tokens.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
# GELU's tanh form is z sigmoid(_C z + _CB z^3), for tanh(x) = 2 sigmoid(2 x) - 1
_C = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CB = tl.constexpr(0.07135481627260025)  # 0.044715 _C


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        return z / (1.0 + tl.exp(-z * (z * z * _CB + _C)))
    elif ACTIVATION == "gelu":
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "gelu_tanh":
        s = 1.0 / (1.0 + tl.exp(-z * (z * z * _CB + _C)))
        return s + s * (1.0 - s) * z * (z * z * (3.0 * _CB) + _C)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        return s + z * s * (1.0 - s)
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    else:
        return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def standardise(y, m_d, D: tl.constexpr):
    """(y - mean) / std over the first D rows of y [BD, n], and 1 / std [1, n]."""
    mean = tl.sum(y, 0) / D
    centred = tl.where(m_d[:, None], y - mean[None, :], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    return centred * r[None, :], r[None, :]


@triton.jit
def head(y, x, p_norm, o_d, m_d, D: tl.constexpr, HAS_NORM: tl.constexpr, RESIDUAL: tl.constexpr):
    """f(x) of the last product y, both [BD, n]; p_norm is the head's LayerNorm, [2, D]."""
    if HAS_NORM:
        w = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(y.dtype)
        b = tl.load(p_norm + D + o_d, mask=m_d, other=0.0).to(y.dtype)
        n, _ = standardise(y, m_d, D)
        y = n * w[:, None] + b[:, None]
    if RESIDUAL:
        y += x
    return y


@triton.jit
def error(
    y, k, v, p_norm, o_d, m_d, D: tl.constexpr, HAS_NORM: tl.constexpr, RESIDUAL: tl.constexpr
):
    """Gradient of ||f(k) - v||^2 with respect to the last product y, all [BD, n]."""
    miss = 2.0 * (head(y, k, p_norm, o_d, m_d, D, HAS_NORM, RESIDUAL) - v)
    if HAS_NORM:
        w = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(y.dtype)
        n, r = standardise(y, m_d, D)
        u = w[:, None] * miss
        centred = u - (tl.sum(u, 0) / D)[None, :] - n * (tl.sum(u * n, 0) / D)[None, :]
        miss = tl.where(m_d[:, None], r * centred, 0.0)
    return miss
