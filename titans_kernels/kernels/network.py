"""The memory as a network, on tiles: activation, output head and error, for all passes.

Tiles are transposed, [width, tokens]: Hopper's tensor cores want 64 rows, a chunk has 16 tokens.
"""

import triton
import triton.language as tl

EPS = tl.constexpr(1e-6)
# GELU's tanh form is z sigmoid(_C z + _CB z^3), for tanh(x) = 2 sigmoid(2 x) - 1
_C = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CB = tl.constexpr(0.07135481627260025)  # 0.044715 _C
_E = tl.constexpr(1.4426950408889634)  # log2 e: exp(x) is exp2(_E x)
_EC, _ECB = tl.constexpr(_E.value * _C.value), tl.constexpr(_E.value * _CB.value)


@triton.jit
def logistic(u):
    """1 / (1 + 2^-u), without the scaling that a quotient takes to cover all numbers."""
    t = 1.0 + tl.exp2(-u)
    return tl.rsqrt(t * t)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        return z * logistic(z * (z * z * _ECB + _EC))
    elif ACTIVATION == "gelu":
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return z * logistic(z * _E)
    elif ACTIVATION == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACTIVATION == "identity", "unknown activation")
        return z


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """The derivative of `activate`."""
    if ACTIVATION == "gelu_tanh":
        s = logistic(z * (z * z * _ECB + _EC))
        du = z * z * (3.0 * _CB) + _C
        return s + (s - s * s) * (z * du)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density
    elif ACTIVATION == "silu":
        s = logistic(z * _E)
        return s + (s - s * s) * z
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)
    else:
        return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def curvature(z, ACTIVATION: tl.constexpr):
    """The derivative of `slope`."""
    if ACTIVATION == "gelu_tanh":  # of z s(u): s'(u) ((z u' (1 - 2 s) + 4) u' - 2 c)
        s = logistic(z * (z * z * _ECB + _EC))
        du = z * z * (3.0 * _CB) + _C
        return (s - s * s) * ((z * du * (1.0 - 2.0 * s) + 4.0) * du - 2.0 * _C)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        return density * (2.0 - z * z)
    elif ACTIVATION == "silu":
        s = logistic(z * _E)
        return (s - s * s) * (2.0 + z * (1.0 - 2.0 * s))
    else:
        return tl.zeros(z.shape, z.dtype)


@triton.jit
def standardise(y, m_d, D: tl.constexpr):
    """(y - mean) / std over the first D rows of y [BD, n], and 1 / std [1, n]."""
    mean = tl.sum(y, 0) / D
    centred = tl.where(m_d[:, None], y - mean[None, :], 0.0)
    r = tl.rsqrt(tl.sum(centred * centred, 0) / D + EPS)
    return centred * r[None, :], r[None, :]


@triton.jit
def head(y, x, p_norm, o_d, m_d, sizes):
    """f(x) of the last product y, both [BD, n]; p_norm is the head's LayerNorm, [2, D]."""
    if sizes.HAS_NORM:
        w = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(y.dtype)
        b = tl.load(p_norm + sizes.D + o_d, mask=m_d, other=0.0).to(y.dtype)
        n, _ = standardise(y, m_d, sizes.D)
        y = n * w[:, None] + b[:, None]
    if sizes.RESIDUAL:
        y += x
    return y


@triton.jit
def jacobian(u, n, r, m_d, D: tl.constexpr):
    """The derivative of `standardise`, its own transpose, times u [BD, n]."""
    centred = u - (tl.sum(u, 0) / D)[None, :] - n * (tl.sum(u * n, 0) / D)[None, :]
    return tl.where(m_d[:, None], r * centred, 0.0)


@triton.jit
def head_backward(do, y, p_norm, o_d, m_d, sizes):
    """Gradient of y, and of the LayerNorm's weight and bias [BD], from that of `head`."""
    if sizes.HAS_NORM:
        w = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(y.dtype)
        n, r = standardise(y, m_d, sizes.D)
        return jacobian(w[:, None] * do, n, r, m_d, sizes.D), tl.sum(do * n, 1), tl.sum(do, 1)
    else:
        return do, tl.sum(do, 1), tl.sum(do, 1)


@triton.jit
def error(y, k, v, p_norm, o_d, m_d, sizes):
    """Gradient of ||f(k) - v||^2 with respect to the last product y, all [BD, n]."""
    miss = 2.0 * (head(y, k, p_norm, o_d, m_d, sizes) - v)
    if sizes.HAS_NORM:
        w = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(y.dtype)
        n, r = standardise(y, m_d, sizes.D)
        miss = jacobian(w[:, None] * miss, n, r, m_d, sizes.D)
    return miss


@triton.jit
def error_backward(dd, y, k, v, p_norm, o_d, m_d, sizes):
    """From the gradient of `error`: of y, of f(k) [BD, n], of the LayerNorm's parameters [BD].

    v's is minus that of f(k), k's the same as it where there is a residual.
    """
    D: tl.constexpr = sizes.D
    if sizes.HAS_NORM:
        w = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(y.dtype)[:, None]
        n, r = standardise(y, m_d, D)
        miss = 2.0 * (head(y, k, p_norm, o_d, m_d, sizes) - v)
        du = jacobian(dd, n, r, m_d, D)
        df = 2.0 * w * du
        # The Jacobian that made the error of u depends on y too, through n and through r.
        u = w * miss
        un, ddn = tl.sum(u * n, 0) / D, tl.sum(dd * n, 0) / D
        dn = w * df - r * (dd * un[None, :] + u * ddn[None, :])
        stretch = tl.sum(dd * jacobian(u, n, r, m_d, D), 0) / D  # of r, times r / D
        dy = jacobian(dn, n, r, m_d, D) - stretch[None, :] * r * n
        return dy, df, tl.sum(miss * du + n * df, 1), tl.sum(df, 1)
    else:
        df = 2.0 * dd
        return df, df, tl.sum(df, 1), tl.sum(df, 1)
