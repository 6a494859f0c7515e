"""The coefficients of a block against the two recurrences they stand for, taken token by token."""

from dataclasses import dataclass, field

import pytest
import torch

from titans_kernels.coefficients import Coefficients, coefficients, coefficients_backward


@dataclass(frozen=True)
class Case:
    edge: str  # what the row stresses
    n: int = 7
    batch: tuple[int, ...] = (2, 3)
    gates: dict = field(default_factory=dict)  # name: (value, tokens that have it)
    invalid: tuple[int, ...] | None = None  # tokens to skip; None: no mask at all
    mask: tuple[int, ...] | None = None  # the mask's batch; None: that of the gates

    def __str__(self):
        return self.edge


ALL = slice(None)
CASES = [
    Case("gates inside their bounds"),
    Case("one token", n=1),
    Case("a whole block", n=64, batch=(2,)),
    Case("no batch", batch=()),
    Case("alpha 1 in the middle", gates={"alpha": (1.0, [3])}),
    Case("alpha 1 twice: a product with two zeros", gates={"alpha": (1.0, [2, 4])}),
    Case("alpha 1 at the first token", gates={"alpha": (1.0, [0])}),
    Case("alpha 1 at the last token", gates={"alpha": (1.0, [6])}),
    Case("alpha 1 at all", gates={"alpha": (1.0, ALL)}),
    Case("alpha 0 at all", gates={"alpha": (0.0, ALL)}),
    Case("eta 0 in the middle", gates={"eta": (0.0, [3])}),
    Case("eta 0 twice", gates={"eta": (0.0, [2, 3])}),
    Case("eta 0 at all", gates={"eta": (0.0, ALL)}),
    Case("eta 1 at all", gates={"eta": (1.0, ALL)}),
    Case("theta 0 in the middle", gates={"theta": (0.0, [3])}),
    Case("theta 0 at all", gates={"theta": (0.0, ALL)}),
    Case(
        "every gate at a bound",
        gates={"alpha": (1.0, [1, 4]), "eta": (0.0, [1, 2]), "theta": (0.0, [2, 5])},
    ),
    Case("all tokens valid", invalid=()),
    Case("invalid at the end", invalid=(5, 6)),
    Case("invalid at the start", invalid=(0, 1)),
    Case("invalid in the middle", invalid=(2, 3)),
    Case("every other token invalid", invalid=(0, 2, 4, 6)),
    Case("all invalid", invalid=tuple(range(7))),
    Case("a mask that all layers share", batch=(4, 2, 3), mask=(2, 3), invalid=(1, 6)),
    Case(
        "invalid tokens at gates' bounds",
        gates={"alpha": (1.0, [3]), "eta": (0.0, [3])},
        invalid=(3,),
    ),
    Case("invalid next to zeros", gates={"alpha": (1.0, [2]), "eta": (0.0, [4])}, invalid=(3,)),
]


def _by_recurrence(theta, alpha, eta, valid):
    """Rows of a, (c, G) and (p, P) after 0..n tokens, row by row.

    A state is a row: what multiplies S_0, then each of the n surprises, its sign aside.
    """
    n = theta.shape[-1]
    unit = torch.eye(n + 1, dtype=theta.dtype)
    a = theta.new_ones(*theta.shape[:-1], 1)
    S = unit[0].expand(*theta.shape[:-1], n + 1)
    W = torch.zeros_like(S)
    rows = [(a, W, S)]
    for t in range(n):
        lr, keep, push = theta[..., t, None], 1 - alpha[..., t, None], eta[..., t, None]
        next_S = push * S + lr * unit[t + 1]
        after = (keep * a, keep * W + next_S, next_S)
        if valid is not None:
            there = valid[..., t, None]
            after = [torch.where(there, x, y) for x, y in zip(after, (a, W, S), strict=True)]
        a, W, S = after
        rows.append((a, W, S))
    a, W, S = (torch.stack(x, -2) for x in zip(*rows, strict=True))
    return Coefficients(a.squeeze(-1), W, S)


def _inputs(case):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    gates = [rand(*case.batch, case.n) for _ in range(3)]
    for name, (value, tokens) in case.gates.items():
        gates[("theta", "alpha", "eta").index(name)][..., tokens] = value
    valid = None
    if case.invalid is not None:
        valid = torch.ones(*(case.batch if case.mask is None else case.mask), case.n).bool()
        valid[..., list(case.invalid)] = False
    # Cotangents are dense: where a coefficient is zero by its place they must have no effect.
    grad = Coefficients(
        *(rand(*case.batch, *size) - 0.5 for size in ((case.n + 1,), *[(case.n + 1,) * 2] * 2))
    )
    return [gate.requires_grad_() for gate in gates], valid, grad


def _assert_close(name, actual, expected, bound):
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    error, limit = (actual - expected).norm(), bound * expected.norm()
    assert error <= limit, f"{name}: error {error:.1e}, bound {limit:.1e}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_the_recurrences(case):
    gates, valid, grad = _inputs(case)
    want = _by_recurrence(*gates, valid)
    with torch.no_grad():
        got = coefficients(*gates, valid)
    for name, actual, expected in zip(want._fields, got, want, strict=True):
        _assert_close(name, actual, expected, 1e-14)

    wanted = torch.autograd.grad(want, gates, grad, allow_unused=True, materialize_grads=True)
    copies = Coefficients(*(x.clone() for x in grad))  # they may be overwritten
    with torch.no_grad():
        found = coefficients_backward(*gates, valid, copies)
    for name, actual, expected in zip(("theta", "alpha", "eta"), found, wanted, strict=True):
        _assert_close(f"d{name}", actual, expected, 1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_are_differentiable_operations_too(case):
    gates, valid, grad = _inputs(case)
    wanted, found = (
        torch.autograd.grad(
            make(*gates, valid), gates, grad, allow_unused=True, materialize_grads=True
        )
        for make in (_by_recurrence, coefficients)
    )
    for name, actual, expected in zip(("theta", "alpha", "eta"), found, wanted, strict=True):
        _assert_close(f"d{name}", actual, expected, 1e-12)


def test_what_an_invalid_token_holds_has_no_effect():
    (theta, alpha, eta), valid, grad = _inputs(Case("", invalid=(2, 5)))
    poisoned = [x.detach().masked_fill(~valid, torch.nan) for x in (theta, alpha, eta)]
    with torch.no_grad():
        for name, actual, expected in zip(
            Coefficients._fields,
            coefficients(*poisoned, valid),
            coefficients(theta, alpha, eta, valid),
            strict=True,
        ):
            _assert_close(name, actual, expected, 0.0)
        for name, actual, expected in zip(
            ("theta", "alpha", "eta"),
            coefficients_backward(*poisoned, valid, Coefficients(*(x.clone() for x in grad))),
            coefficients_backward(theta, alpha, eta, valid, grad),
            strict=True,
        ):
            _assert_close(f"d{name}", actual[valid], expected[valid], 0.0)


def test_they_are_the_weights_and_momentum_of_a_memory():
    """W_t and S_t put together from coefficients, against the memory's two lines of arithmetic."""
    (theta, alpha, eta), _, _ = _inputs(Case("", n=9, batch=()))
    generator = torch.Generator().manual_seed(1)
    W, S, *g = torch.randn(11, 3, 2, generator=generator, dtype=torch.float64)
    a, Q, M = coefficients(theta, alpha, eta)
    sources = torch.stack([S, *(-x for x in g)])
    W_0 = W
    for t in range(9):
        S = eta[t] * S - theta[t] * g[t]
        W = (1 - alpha[t]) * W + S
        made = torch.einsum("j,jab->ab", Q[t + 1], sources) + a[t + 1] * W_0
        _assert_close(f"W_{t + 1}", made, W, 1e-14)
        _assert_close(f"S_{t + 1}", torch.einsum("j,jab->ab", M[t + 1], sources), S, 1e-14)
