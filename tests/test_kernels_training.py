"""Training through the Triton kernels: the losses of the PyTorch backend, and few bytes a token."""

import weakref
from contextlib import ExitStack
from itertools import accumulate
from math import prod
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton
from inputs import make_inputs
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from yardstick import flat

from titans_kernels import NeuralMemory, neural_memory
from titans_kernels.demo.model import ByteModel
from titans_kernels.kernels import launch, launch_backward, operator
from titans_kernels.kernels.records import TokenGrad
from titans_kernels.kernels.tiles import Tile
from titans_kernels.packing import Options, pack

if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("what the interpreter computes", allow_module_level=True)
if triton.knobs.runtime.interpret:
    from triton_support.interpreter import install

    install()

# ------------------------------------------------------------------------------------- the losses


def _losses(backend, steps=32):
    """Of a small demo model that learns a short text by heart, two pieces of it in turn."""
    torch.manual_seed(0)
    model = ByteModel(dim=16, blocks=1, heads=1, dim_head=16)
    for layer in model.modules():
        if isinstance(layer, NeuralMemory):
            layer.backend = backend
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor(list(b"the memory learns while it reads"))[None]
    losses, states = [], None
    for step in range(steps):
        i = step % 2 * 15
        logits, states = model(text[:, i : i + 15], states if step % 2 else None)
        loss = F.cross_entropy(logits[0], text[0, i + 1 : i + 16])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states = [state.detach() for state in states]
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_losses_are_those_of_the_torch_backend():
    got, want = _losses("triton"), _losses("torch")
    assert want[-1] < want[0] / 2
    for step, (x, y) in enumerate(zip(got, want, strict=True)):
        assert abs(x - y) <= 1e-5 * y, f"step {step}: {x} is not {y}"


# ------------------------------------------------------------------------------------- the memory


def _bytes(x):
    if torch.is_tensor(x):
        return x.nbytes
    return sum(map(_bytes, x)) if isinstance(x, list | tuple) else 0


def _planned(T, H=16, D=64, hidden=256):
    """Bytes that a step holds of states, and of one group's scratch, without what grows with T."""
    with torch.device("meta"):
        q, k, v = (torch.empty(1, T, H, D, dtype=torch.bfloat16) for _ in "qkv")
        gates = tuple(torch.empty(1, T, H) for _ in "tae")
        weights = torch.empty(H, D, hidden), torch.empty(H, hidden, D)
        norm = torch.empty(H, D), torch.empty(H, D)
        packed, longest = pack(q, k, v, gates, weights, norm, None, None)
        plan = operator.Plan.of(packed, Options("gelu_tanh", True), 16, longest)
        scratch = launch.allocate(plan.tokens, packed.weights, plan.problem, plan.group, True)
        states = [*packed.weights, *packed.momentum]
        grad = launch_backward.allocate(scratch, TokenGrad(*packed[:6]), states, states)
    kept = sum(4 * prod(shape) for shape in operator.kept_shapes(packed, 16))
    between = [(x.x, x.d, x.e) for x in grad.layers]
    return kept, _bytes([*scratch, grad.coefficient, between, grad.norm])


def test_a_long_sequence_keeps_few_states():
    T, H = 2**15, 16
    kept, scratch = _planned(T)
    assert kept <= 256 * T * H
    longer, same = _planned(2 * T)
    assert longer <= 256 * 2 * T * H and same == scratch
    assert scratch <= 17 * 1024 * operator.GROUP * H  # bytes a token and head of one group


class _Live(TorchDispatchMode):
    """Bytes of all tensors that are made inside, and the most of them at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if torch.is_tensor(x) and x.untyped_storage() not in self.seen:
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        self.seen[storage] = True
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, count):
        self.now -= count


class _Nothing:
    def __getitem__(self, grid):
        return lambda **_: None


def _most(B, T, H=16, D=64, hidden=256):
    """Bytes of forward and backward together beyond inputs, outputs and gradients."""
    options = Options("gelu_tanh", True)
    with torch.device("meta"), ExitStack() as stack:
        for module in (launch, launch_backward):
            kernels = [name for name in vars(module) if name.endswith("_kernel")]
            nothing = dict.fromkeys(kernels, _Nothing())
            stack.enter_context(mock.patch.multiple(module, **nothing))
        q, k, v = (torch.empty(B, T, H, D, dtype=torch.bfloat16) for _ in "qkv")
        gates = tuple(torch.empty(B, T, H) for _ in "tae")
        weights = torch.empty(H, D, hidden), torch.empty(H, hidden, D)
        norm = torch.empty(H, D), torch.empty(H, D)
        packed, longest = pack(q, k, v, gates, weights, norm, None, None)
        live = stack.enter_context(_Live())
        kept = [torch.empty(shape) for shape in operator.kept_shapes(packed, 16)]
        o, state = operator.forward(packed, options, 16, longest, kept)
        grads = operator.backward(packed, options, 16, longest, kept, o, state)
        return live.most - _bytes([o, state, grads])


def test_many_sequences_take_no_more_scratch_than_allowed(monkeypatch):
    assert _most(32, 4096) <= 4 * 10**9
    few = _most(1, 4096)
    monkeypatch.setenv("TITANS_KERNELS_SCRATCH", "200")
    assert _most(1, 4096) < few
    monkeypatch.setenv("TITANS_KERNELS_SCRATCH", "2 GB")
    with pytest.raises(ValueError, match="SCRATCH: got '2 GB', takes a whole number"):
        operator.budget()


def _peak(function):
    """Bytes that the function has allocated at most, at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    return max(accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())))


def test_a_step_grows_by_few_bytes_a_token():
    """Beyond outputs and gradients, in a group that is as long for its states as one of 2,048."""
    peaks, D, lengths = [], 16, (192, 384)
    for T in lengths:
        inputs = make_inputs(1, T, 1, D, 32, 2, dtype=torch.float32)

        def train(inputs=inputs):
            o, _ = neural_memory(**inputs, backend="triton")
            torch.autograd.grad(o.sum(), list(flat(inputs).values()))

        sizes = {"GROUP": 64, "tile": lambda *_: Tile(64, 32)}
        with mock.patch.multiple(operator, **sizes):
            peaks.append(_peak(train))
    grown = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    o_and_gradients = 4 * (D + D + 3 * D + 3)  # o and its gradient, of q, k, v and of gates
    assert grown <= o_and_gradients + 256, f"{grown - o_and_gradients:.0f} bytes a token"
