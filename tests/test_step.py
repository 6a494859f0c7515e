"""A token decoded in place: three kernels around the projections, into the state's own tensors."""

import json

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from titans_kernels import NeuralMemory
from titans_kernels.kernels import launch, launch_step, operator
from titans_kernels.kernels.tiles import Tile, using
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from titans_kernels.packing import Options, Packed
from titans_kernels.selfcheck import decide

SMALL = Tile(16, 16, 16, 16)
BACKENDS = "torch", pytest.param("triton", marks=pytest.mark.slow)
LAYERS = {
    "default": {},
    "depth 1": {"depth": 1},
    "depth 3, gates per layer": {"depth": 3, "per_layer_gates": True},
    "no convolution": {"conv_size": None},
    "one tap": {"conv_size": 1},
    "no norm, no residual": {"norm": False, "residual": False, "activation": "silu"},
    "chunk 5": {"chunk_size": 5},
    "chunk over blocks": {"chunk_size": 20},
}

ESSENTIAL = "default", "depth 3, gates per layer", "one tap", "chunk over blocks"


def made(backend="torch", **options):
    torch.manual_seed(0)
    options = {"heads": 2, "dim_head": 16, "expansion": 2, "chunk_size": 4} | options
    layer = NeuralMemory(24, backend=backend, dtype=torch.float64, **options)
    with torch.no_grad():  # gates that differ, and what forgets and moves
        layer.alpha_bias.add_(5.0).add_(torch.randn_like(layer.alpha_bias))
        layer.theta_bias.add_(torch.randn_like(layer.theta_bias))
    return layer


def started(layer, *lengths):
    """States of sequences of these lengths, each with a chunk opened as far."""
    x = torch.randn(1, sum(lengths), layer.dim, dtype=torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return layer(x, cu_seqlens=ends)[1]


def assert_close(state, wanted, tolerance=1e-11):
    leaves, other = pytree.tree_leaves(state), pytree.tree_leaves(wanted)
    assert len(leaves) == len(other)
    for x, y in zip(leaves, other, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_in_place_equals_a_new_state(options):
    chunk = made(**options).chunk_size
    compare("torch", options, [chunk - 1, 0, chunk // 2, chunk], chunk + 1)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=() if name in ESSENTIAL else pytest.mark.wide)
        for name, options in LAYERS.items()
    ],
)
def test_in_place_equals_a_new_state_on_triton(options):
    """One sequence ends its chunk with the first token, one opens it."""
    chunk = made(**options).chunk_size
    compare("triton", options, [chunk - 1, 0], 2)


def compare(backend, options, lengths, steps):
    layer, judge = made(backend, **options), made("torch", **options)
    state = started(judge, *lengths).clone()
    wanted, where = state.clone(), [x.data_ptr() for x in pytree.tree_leaves(state)]
    for _ in range(steps):
        x = torch.randn(len(lengths), layer.dim, dtype=torch.float64)
        with using(SMALL):
            out, after = layer.step(x, state, inplace=True)
        judged, wanted = judge.step(x, wanted)
        torch.testing.assert_close(out, judged, rtol=1e-11, atol=1e-11)
        assert after is state
        assert_close(state, wanted)
    assert where == [x.data_ptr() for x in pytree.tree_leaves(state)]


@torch.no_grad()
@pytest.mark.parametrize(
    "block",
    [
        lambda: TitansLMM(24, heads=2, n_persistent=3, chunk_size=4),
        lambda: TitansMAG(24, heads=2, window=5, chunk_size=4),
        lambda: TitansMAL(24, heads=2, window=5, chunk_size=4),
        lambda: TitansMAC(24, heads=2, segment=5, chunk_size=4),
        lambda: TitansTNT(24, heads=2, global_chunk=8, local_chunks=(4,), reset_every=8),
    ],
    ids=["lmm", "mag", "mal", "mac", "tnt"],
)
def test_every_block_decodes_in_place(block):
    torch.manual_seed(0)
    block = block().double()
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    _, state = block(x[:, :3])
    state, wanted = state.clone(), state.clone()
    where = [y.data_ptr() for y in pytree.tree_leaves(state)]
    for t in range(3, 12):
        out, state = block.step(x[:, t], state, inplace=True)
        judged, wanted = block.step(x[:, t], wanted)
        torch.testing.assert_close(out, judged, rtol=1e-11, atol=1e-11)
        assert_close(state, wanted)
    assert where == [y.data_ptr() for y in pytree.tree_leaves(state)]


@torch.no_grad()
def test_parameters_are_no_state():
    """The state of no tokens at all has the first weights: a copy of them."""
    layer = made()
    first = [w.clone() for w in layer.weights]
    _, state = layer(torch.randn(1, 0, 24, dtype=torch.float64))
    for _ in range(5):
        _, state = layer.step(torch.randn(1, 24, dtype=torch.float64), state, inplace=True)
    assert all(map(torch.equal, first, layer.weights))
    assert not torch.equal(state.memory.weights[0][0], first[0])


@torch.no_grad()
def test_strided_states_are_overwritten_too():
    layer = made()
    state = started(layer, 3, 1)
    turned = state.map(lambda x: x.mT.contiguous().mT if x.dim() > 1 else x.clone())
    assert not turned.memory.weights[0].is_contiguous()
    wanted = state.clone()
    for _ in range(2):
        x = torch.randn(2, 24, dtype=torch.float64)
        _, wanted = layer.step(x, wanted, inplace=True)
        layer.step(x, turned, inplace=True)
    assert_close(turned, wanted)


@torch.no_grad()
def test_hooks_are_called():
    """What shards, offloads or casts around a call works by hooks."""
    layer, called = made(), []
    _, state = layer(torch.randn(1, 3, 24, dtype=torch.float64))
    layer.register_forward_pre_hook(lambda *_: called.append("before"))
    before = state.memory.k.data_ptr()
    layer.step(torch.randn(1, 24, dtype=torch.float64), state, inplace=True)
    assert called == ["before"] and state.memory.length.tolist() == [0]
    assert state.memory.k.data_ptr() == before


def test_gradients_and_arguments():
    layer = made()
    x = torch.randn(1, 24, dtype=torch.float64)
    _, state = layer.step(x)
    with pytest.raises(RuntimeError, match="inplace: got True while gradients are recorded"):
        layer.step(x, state, inplace=True)
    with torch.no_grad():
        with pytest.raises(TypeError, match="inplace: got 1, takes True or False"):
            layer.step(x, state, inplace=1)
        with pytest.raises(ValueError, match="dim = 24"):
            layer.step(x[:, :3], state, inplace=True)
        with pytest.raises(TypeError, match=r"x: got dtype torch.float32"):
            layer.step(x.float(), state, inplace=True)
        other = made(chunk_size=5).step(x)[1]
        with pytest.raises(ValueError, match="got chunks of 5 tokens"):
            layer.step(x, other, inplace=True)
        out, fresh = layer.step(x, inplace=True)  # nothing to overwrite
    assert out.shape == (1, 24) and fresh.memory.length.tolist() == [1]


def test_a_state_is_copied_into_another():
    layer = made()
    _, one = layer.step(torch.randn(1, 24, dtype=torch.float64))
    two = layer.step(torch.randn(1, 24, dtype=torch.float64))[1].detach().clone()
    assert two.copy_(one) is two
    assert_close(two, one.detach(), 0.0)
    with pytest.raises(ValueError, match=r"other: got a tensor of torch.float64 .*, takes"):
        two.copy_(made(chunk_size=5).step(torch.randn(1, 24, dtype=torch.float64))[1])
    with pytest.raises(ValueError, match="other: got a state of another structure"):
        two.copy_(made(depth=3).step(torch.randn(1, 24, dtype=torch.float64))[1])


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(backend, value):
    layer = made(backend, activation="relu")
    state = started(made(), 2, 2).clone()
    x = torch.randn(2, 24, dtype=torch.float64)
    x[1] = value
    for _ in range(4):
        out, state = layer.step(x, state, inplace=True)
        assert out[0].isfinite().all() and not out[1].isfinite().any()
    assert all(w[0].isfinite().all() and not w[1].isfinite().any() for w in state.memory.weights)


@pytest.fixture
def undecided(tmp_path, monkeypatch):
    monkeypatch.setenv("TITANS_KERNELS_AUTO", "check")
    monkeypatch.setenv("TITANS_KERNELS_CACHE", str(tmp_path))
    decide.forget()
    yield tmp_path
    decide.forget()


def auto_step():
    """By "auto", and by PyTorch."""
    layers = [made(backend, heads=1).float() for backend in ("auto", "torch")]
    x = torch.randn(1, 24)
    states = [layers[1].step(x)[1].detach().clone() for _ in layers]
    with torch.no_grad():
        return [
            layer.step(x, state, inplace=True) for layer, state in zip(layers, states, strict=True)
        ]


@pytest.mark.slow
def test_kernels_of_a_step_are_checked(undecided, monkeypatch):
    (out, state), (judged, wanted) = auto_step()
    torch.testing.assert_close(out, judged)
    assert_close(state, wanted, 1e-5)
    (record,) = undecided.iterdir()
    passed = json.loads(record.read_text())["passed"]
    assert (passed["operator"], passed["taps"], passed["chunk_size"]) == ("step", 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["prepare", "finish"])
def test_wrong_kernels_of_a_step_are_found(undecided, monkeypatch, wrong):
    right = getattr(launch_step, wrong)

    def planted(*args):
        found = right(*args)
        (found.theta if wrong == "prepare" else found).mul_(1.1)
        return found

    monkeypatch.setattr(launch_step, wrong, planted)
    with pytest.warns(RuntimeWarning, match="failed their check and are not used"):
        (out, state), (judged, wanted) = auto_step()
    assert torch.equal(out, judged)
    assert_close(state, wanted, 0.0)
    assert not list(undecided.iterdir())


def test_bytes_of_a_step(monkeypatch):
    """All that the memory's kernel reads or writes, each byte once, beside W and S."""
    touched = []

    def note(query, token, scratch, problem, final):
        layers = [layer._replace(W_exact=None, S_exact=None) for layer in scratch.layers]
        layers = [layer._replace(W_anchor=None, S_anchor=None) for layer in layers]
        parts = query, token, scratch._replace(layers=tuple(layers))
        touched.extend(x for x in pytree.tree_leaves(parts) if isinstance(x, torch.Tensor))

    monkeypatch.setattr(launch, "short", note)
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(3, 16, 4, 64, dtype=torch.bfloat16)
        gates = [torch.empty(3, 16, 4, 1) for _ in range(3)]
        memory = [torch.empty(3, 4, *size) for size in [(64, 256), (256, 64)] * 2]
        rows = [y.flatten(0, 1) for y in (x, x, *gates)]
        index = [torch.empty(*size, dtype=torch.int64) for size in ((3, 2), (3,), (3,))]
        packed = Packed(x[:, 0], *rows, memory[:2], memory[2:], None, *index)
        operator.forward(packed, Options("gelu_tanh", True), 16, 16, [], False)
    states = sum(w.nbytes for w in memory)
    assert states < sum(y.nbytes for y in touched) <= 1.3 * states


class Operations(TorchDispatchMode):
    """What is computed: neither views nor memory without values."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if not any(part in name for part in ("view", "empty", "unsqueeze", "promote_types", ".t.")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.slow
def test_launches_of_a_step(monkeypatch):
    """Eight projections and three kernels."""
    from triton.runtime.interpreter import InterpretedFunction

    layer = made("triton")
    state = started(made(), 3, 1).clone()
    launched, run = [], InterpretedFunction.run
    monkeypatch.setattr(
        InterpretedFunction,
        "run",
        lambda self, *args, **kwargs: (
            launched.append(self.fn.__name__) or run(self, *args, **kwargs)
        ),
    )
    x = torch.randn(2, 24, dtype=torch.float64)
    with Operations() as operations:
        layer.step(x, state, inplace=True)
    assert launched == ["prepare_kernel", "short_kernel", "finish_kernel"]
    outside = [name for name in operations.names if "titans_kernels" not in name]
    assert outside == ["aten.mm.default"] * 8


@torch.no_grad()
def test_compiled():
    layer = made()
    state = started(layer, 3, 1).clone()
    other = state.clone()
    step = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(2, 24, dtype=torch.float64)
        out, _ = step(x, state, inplace=True)
        judged, _ = layer.step(x, other, inplace=True)
        torch.testing.assert_close(out, judged, rtol=1e-12, atol=1e-12)
        assert_close(state, other, 1e-12)
