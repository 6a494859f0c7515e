"""The custom ops keep the promises that PyTorch's compiler, autograd and export rely on."""

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from inputs import make_inputs
from torch.library import opcheck
from yardstick import TOKENS

from titans_kernels import neural_memory, ops
from titans_kernels.packing import Reading, pack


@dataclass(frozen=True)
class Case:
    edge: str  # what the row stresses
    T: int = 20
    chunk: int = 5
    depth: int = 2
    norm: bool = True
    per_layer: bool = False  # gates
    H: int = 2
    D: int = 4
    hidden: int = 6
    lengths: tuple[int, ...] | None = None  # of packed sequences, T in all
    past: tuple[int, ...] | None = None  # tokens that each sequence has behind it
    backend: str = "torch"

    def __str__(self):
        return f"{self.edge}, {self.backend}"


CASES = [
    Case("dense"),
    Case("linear", depth=1, norm=False),
    Case("three layers", depth=3, per_layer=True),
    Case("packed", lengths=(7, 0, 13)),
    Case("going on", past=(3, 0, 8)),
    Case("packed, going on", lengths=(1, 19), past=(3, 7), norm=False),
    Case("chunk over blocks", T=90, chunk=80, past=(70, 5)),
    Case("several spans", T=270, chunk=16),
    Case("several spans of a chunk", T=1400, chunk=1300),
    Case("one token", T=1),
    Case("no token", T=0),
    Case("no token, going on", T=0, past=(7,)),
    # The interpreter takes its time.
    Case("linear", T=3, H=1, D=16, depth=1, norm=False, past=(1,), backend="triton"),
]


def _packed(case, requires_grad):
    """The arguments of the memory's op, the tensors leaves."""
    sizes = {
        "H": case.H,
        "D": case.D,
        "hidden": case.hidden,
        "depth": case.depth,
        "norm": case.norm,
    }
    sizes |= {"per_layer_gates": case.per_layer, "requires_grad": False}
    B = 1 if case.lengths or case.past is None else len(case.past)
    inputs, state = make_inputs(B, case.T, lengths=case.lengths, **sizes), None
    if case.past is not None:
        behind = make_inputs(1, sum(case.past), lengths=case.past, **sizes)
        _, state = neural_memory(**behind, chunk_size=case.chunk, output_final_state=True)
    q, k, v, *gates = (inputs[name] for name in TOKENS)
    weights, norm, cu_seqlens = inputs["weights"], inputs["norm"], inputs.get("cu_seqlens")
    packed, longest = pack(q, k, v, tuple(gates), weights, norm, state, cu_seqlens)
    leaves = [x.requires_grad_(requires_grad) for x in packed.differentiable()]
    return packed.like(leaves), (case.backend, "gelu_tanh", True, "token", case.chunk, longest)


@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_memory(case, gradients):
    packed, how = _packed(case, gradients)
    opcheck(ops._memory, (*packed, *how, True, gradients))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_state_that_is_not_requested_is_not_made(case):
    packed, how = _packed(case, True)
    opcheck(ops._memory, (*packed, *how, False, True))
    leaves = packed.differentiable()
    o, final, _ = ops._memory(*packed, *how, True, True)
    alone, none, _ = ops._memory(*packed, *how, False, True)
    assert none == [] and len(final) == 2 * len(packed.weights)
    torch.testing.assert_close(alone, o)
    want, got = (torch.autograd.grad(x.square().sum(), leaves) for x in (o, alone))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_backward(case):
    packed, how = _packed(case, False)
    o, final, kept = ops._memory(*packed, *how, True, True)
    do, dfinal = torch.randn_like(o), [torch.randn_like(x) for x in final]
    opcheck(ops._memory_backward, (*packed, *how, kept, do, dfinal))


def _reading(case, requires_grad):
    packed, (*how, _, _, _) = _packed(case, requires_grad)
    starts = torch.cat([packed.query_start, torch.tensor([len(packed.q)])])
    return Reading(packed.q, packed.weights, packed.norm, starts), (*how, case.T)


@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reading(case, gradients):
    reading, how = _reading(case, gradients)
    opcheck(ops._retrieve, (*reading, *how))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_backward_too(case):
    reading, how = _reading(case, False)
    opcheck(ops._retrieve_backward, (*reading, *how, torch.randn_like(reading.q)))


# ----------------------------------------------------------------------------------- derivatives


TINY = Case("tiny", T=6, chunk=4, D=2, hidden=3, past=(3, 2))


def _memory():
    packed, how = _packed(TINY, True)

    def op(*leaves):
        o, final, _ = ops._memory(*packed.like(list(leaves)), *how, True, True)
        return (o, *final)

    return op, packed.differentiable()


def _reader():
    reading, how = _reading(TINY, True)
    return lambda *leaves: ops._retrieve(
        *reading.like(list(leaves)), *how
    ), reading.differentiable()


@pytest.mark.parametrize("op", [_memory, _reader])
def test_gradients_of_finite_differences(op):
    function, leaves = op()
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_third_derivatives():
    """Of one sum, by one gate: those of finite differences."""
    function, leaves = _memory()
    gate = leaves[3]

    def second(theta):
        o, *_ = function(*leaves[:3], theta, *leaves[4:])
        (first,) = torch.autograd.grad(o.square().sum(), theta, create_graph=True)
        (found,) = torch.autograd.grad(first.square().sum(), theta, create_graph=True)
        return found

    assert torch.autograd.gradcheck(second, gate, fast_mode=True)


def test_a_gradient_takes_what_forward_saves():
    packed, how = _packed(TINY, True)
    o, _, kept = ops._memory(*packed, *how, True, False)
    assert not kept
    with pytest.raises(RuntimeError, match=r"^titans_kernels::neural_memory: save is False"):
        o.sum().backward()


def test_a_backend_with_first_derivatives_only_says_so():
    with mock.patch.dict(ops._MODULES, {"triton": "chunked"}):
        packed, (_, *how) = _packed(TINY, True)
        o, _, _ = ops._memory(*packed, "triton", *how, True, True)
        (dq,) = torch.autograd.grad(o.sum(), packed.q, create_graph=True)
        with pytest.raises(RuntimeError, match=r"^backend: got 'triton', .* take backend='torch'"):
            dq.sum().backward()


@pytest.mark.parametrize("op", [_memory, _reader])
def test_second_derivatives_under_autocast(op):
    """Are those outside it, to the bit: nothing is rounded to the dtype of autocast."""
    function, leaves = op()
    leaves = [x.detach().float().requires_grad_() for x in leaves]  # autocast leaves float64 alone

    def second():
        out = function(*leaves)
        total = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))
        first = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), leaves)

    want = second()
    with torch.autocast("cpu", torch.bfloat16):
        got = second()
    assert all(map(torch.equal, got, want))
