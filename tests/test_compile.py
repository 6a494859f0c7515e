"""torch.compile and torch.export take operators and layer whole, and change nothing."""

from functools import partial

import pytest
import torch
from inputs import make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from yardstick import assert_gradients, assert_values, flat, gradients

from titans_kernels import MemoryState, NeuralMemory, neural_memory, retrieve
from titans_kernels.layers import TitansMAC, TitansMAG, TitansMAL

LENGTHS = (20, 31, 64, 200, 501)  # several spans of blocks, and none


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled(function, backend="aot_eager", **options):
    """A function in one graph, and how many were compiled."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def _measure(function, leaves, *args, **options):
    values = flat(dict(zip(("o", "state"), function(*args, **options), strict=True)))
    return values, gradients(values, leaves)


def _assert_same(compiled, eager, leaves, *args, bound=0.0, **options):
    """The same values and gradients."""
    got = _measure(compiled, leaves, *args, **options)
    want = _measure(eager, leaves, *args, **options)
    assert_values(got[0], want[0], bound)
    assert_gradients(got[1], want[1], bound)


def _leaf(state):
    """The same state, its tensors leaves."""
    return state.map(lambda x: x.detach().requires_grad_(x.is_floating_point()))


OPERATOR = {
    "two layers": {},
    "linear": {"depth": 1, "norm": False},
    "three layers": {"depth": 3, "activation": "silu"},
    "a chunk over blocks": {"chunk_size": 90},
    "no residual": {"residual": False, "chunk_size": 1},
}


# Network, chunk and whether there is a state take turns; `make test-all` has all pairs.
GOES_ON = {
    **dict.fromkeys(("linear", "a chunk over blocks"), (True,)),
    **dict.fromkeys(("three layers", "no residual"), (False,)),
    "two layers": (False, True),
}


@pytest.mark.parametrize(
    "options, goes_on",
    [
        pytest.param(
            *(options, goes_on),
            id=f"{name}, going on" if goes_on else name,
            marks=() if goes_on in GOES_ON[name] else pytest.mark.wide,
        )
        for name, options in OPERATOR.items()
        for goes_on in (False, True)
    ],
)
def test_the_operator_at_any_length(options, goes_on):
    """One graph for all lengths, though every other length keeps another number of states."""
    depth, norm = options.get("depth", 2), options.get("norm", True)
    options = {name: x for name, x in options.items() if name not in ("depth", "norm")}
    compiled, counter = _compiled(neural_memory, dynamic=True)
    for T in LENGTHS:
        inputs, state = make_inputs(3, T, 2, 4, 6, depth, norm=norm), None
        if goes_on:
            past = make_inputs(3, 13, 2, 4, 6, depth, norm=norm, seed=1, requires_grad=False)
            _, state = neural_memory(**past, **options, output_final_state=True)
            state = _leaf(state)
        arguments = inputs | options | {"initial_state": state, "output_final_state": True}
        leaves = flat(inputs | ({"state": state} if goes_on else {}))
        # Where no chunk ends, weights pass by the op, unless compiled: sums are in another order.
        bound = 1e-13 if goes_on else 0.0
        _assert_same(compiled, neural_memory, leaves, bound=bound, **arguments)
    assert counter.frame_count == 1


def test_packed_sequences_of_any_number_and_length():
    compiled, counter = _compiled(neural_memory, dynamic=True)
    reads, reading = _compiled(retrieve, dynamic=True)
    for lengths in ((20, 0, 13, 1, 7, 9), (3, 1, 4, 200, 2, 2, 0), (1, 300, 1, 0, 0)):
        inputs = make_inputs(1, sum(lengths), 2, 4, 10, 2, lengths=lengths)
        leaves = flat(inputs)
        _assert_same(compiled, neural_memory, leaves, **inputs, output_final_state=True)
        with torch.no_grad():
            _, state = neural_memory(**inputs, output_final_state=True)
        arguments = inputs["q"], _leaf(state)
        options = {"norm": inputs["norm"], "cu_seqlens": inputs["cu_seqlens"]}
        found = [read(*arguments, **options) for read in (reads, retrieve)]
        assert_values({"o": found[0]}, {"o": found[1]}, 0.0)
        leaves = flat({"q": inputs["q"], "state": arguments[1], "norm": inputs["norm"]})
        assert_gradients(*(gradients({"o": o}, leaves) for o in found), 0.0)
    assert counter.frame_count == reading.frame_count == 1


def test_weights_are_read():
    compiled, counter = _compiled(retrieve, dynamic=True)
    for T in LENGTHS:
        inputs = make_inputs(3, T, 2, 4, 6, 2)
        found = [
            read(inputs["q"], inputs["weights"], norm=inputs["norm"])
            for read in (compiled, retrieve)
        ]
        leaves = flat({name: inputs[name] for name in ("q", "weights", "norm")})
        assert_values({"o": found[0]}, {"o": found[1]}, 0.0)
        assert_gradients(*(gradients({"o": o}, leaves) for o in found), 0.0)
    assert counter.frame_count == 1


def test_one_graph_of_several_calls():
    """A state goes from call to call inside what is compiled, and comes out as what it is."""

    def pieces(inputs, cut):
        first, second = (
            inputs | {n: inputs[n][:, part] for n in ("q", "k", "v", "theta", "alpha", "eta")}
            for part in (slice(None, cut), slice(cut, None))
        )
        _, state = neural_memory(**first, output_final_state=True)
        o, state = neural_memory(**second, initial_state=state, output_final_state=True)
        return o + retrieve(second["q"], state, norm=inputs["norm"]), state

    inputs = make_inputs(2, 50, 2, 4, 6, 2)
    compiled, counter = _compiled(pieces)
    _assert_same(compiled, pieces, flat(inputs), inputs, 21)
    assert counter.frame_count == 1
    assert isinstance(compiled(inputs, 21)[1], MemoryState)


def test_without_gradients():
    inputs = make_inputs(2, 50, 2, 4, 6, 2)
    compiled, _ = _compiled(neural_memory)
    want, _ = neural_memory(**inputs)
    with torch.no_grad():
        o, _ = compiled(**inputs)
    assert torch.equal(o, want) and not o.requires_grad


@pytest.mark.slow
def test_inductor_compiles_it():
    inputs = make_inputs(2, 50, 2, 4, 6, 2)
    function = partial(neural_memory, output_final_state=True)
    compiled, counter = _compiled(function, backend="inductor")
    _assert_same(compiled, function, flat(inputs), bound=1e-12, **inputs)
    assert counter.frame_count == 1


# ------------------------------------------------------------------------------------- the layer


def _layer(**options):
    torch.manual_seed(0)
    return NeuralMemory(12, heads=2, chunk_size=5, dtype=torch.float64, **options)


def test_the_layer_at_any_length():
    """Compiled for one length, then, once, for all others; with a state, once more."""
    layer = _layer(per_layer_gates=True)
    compiled, counter = _compiled(layer)
    leaves = dict(layer.named_parameters())
    for state in (None, layer(torch.randn(3, 8, 12, dtype=torch.float64))[1].detach()):
        for T in LENGTHS:
            x = torch.randn(3, T, 12, dtype=torch.float64)
            _assert_same(compiled, layer, leaves, x, state)
    assert counter.frame_count <= 4


def test_the_layer_packed():
    layer = _layer()
    compiled, counter = _compiled(layer, dynamic=True)
    leaves = dict(layer.named_parameters())
    for ends in ([0, 7, 7, 19], [0, 100, 101, 103, 160]):
        x = torch.randn(1, ends[-1], 12, dtype=torch.float64)
        _assert_same(compiled, layer, leaves, x, None, torch.tensor(ends))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_under_autocast(dtype):
    """Projections are rounded, the memory is not, compiled or not."""
    layer, x = _layer().float(), torch.randn(2, 40, 12)

    def run(function):
        with torch.autocast("cpu", dtype=dtype):
            return function(x)

    compiled, counter = _compiled(layer)
    leaves = dict(layer.named_parameters())
    bound = 2 * torch.finfo(dtype).eps
    _assert_same(partial(run, compiled), partial(run, layer), leaves, bound=bound)
    assert counter.frame_count == 1


def test_a_mistake_says_what_it_is():
    compiled = torch.compile(neural_memory, backend="aot_eager")
    inputs = make_inputs(1, 20, 2, 4, 6, 2)
    with pytest.raises(ValueError, match=r"^k: got shape \[1, 5, 2, 4\], takes that of q"):
        compiled(**inputs | {"k": inputs["k"][:, :5]})


# ---------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("goes_on", [False, True], ids=["", "going on"])
def test_the_layer_is_exported(goes_on, strict):
    """For any length; a state goes in and comes out."""
    layer = _layer().eval()
    make = partial(torch.randn, dtype=torch.float64)
    state = layer(make(3, 8, 12))[1].detach()
    arguments = lambda T: (make(3, T, 12), *([state] if goes_on else []))  # noqa: E731
    example, shapes = arguments(20), torch.export.ShapesCollection()
    shapes[example[0]] = {1: torch.export.Dim("T", min=2, max=4096)}
    program = torch.export.export(layer, example, dynamic_shapes=shapes, strict=strict).module()
    for T in LENGTHS:
        given = arguments(T)
        found, want = program(*given), layer(*given)
        assert pytree.tree_structure(found) == pytree.tree_structure(want)
        assert all(map(torch.equal, pytree.tree_leaves(found), pytree.tree_leaves(want)))


def _texts(*lengths):
    return [torch.randn(2, T, 12, dtype=torch.float64) for T in lengths]


# Within a window or segment, at its end, one token more, whole ones and not, none a text before.
ANY = (13, 17, 9, 3, 26, 11, 7, 10, 4, 2, 41, 64, 5, 6, 15, 20)


@torch.no_grad()
def test_windows_at_any_length():
    """Compiled for one length, then, once, for all others."""
    block = TitansMAG(12, heads=2, window=5, chunk_size=4, n_persistent=2, dtype=torch.float64)
    compiled, counter = _compiled(block, "eager")
    for x in _texts(*ANY):
        torch.testing.assert_close(compiled(x)[0], block(x)[0])
    assert counter.frame_count == 2


def test_gradients_through_windows_at_any_length():
    block = TitansMAL(12, heads=2, window=5, chunk_size=4, n_persistent=0, dtype=torch.float64)
    compiled, counter = _compiled(block, dynamic=True)
    leaves = dict(block.named_parameters())
    for x in _texts(13, 3, 20, 7):
        _assert_same(compiled, block, leaves, x, bound=1e-12)
    assert counter.frame_count == 1


def test_segments_at_any_length():
    """Without `fullgraph`: graphs of a segment, whole or not, however many there are."""
    block = TitansMAC(12, heads=2, segment=5, chunk_size=4, n_persistent=2, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, leaves = torch.compile(block, backend=counter), dict(block.named_parameters())
    for x in _texts(8, 11):  # the rest of the last segment is three tokens, then one
        _assert_same(compiled, block, leaves, x, bound=1e-12)
    graphs = counter.frame_count
    for x in _texts(7, 64, 36):
        _assert_same(compiled, block, leaves, x, bound=1e-12)
    assert counter.frame_count == graphs <= 8


@torch.no_grad()
def test_segments_in_one_graph():
    block = TitansMAC(12, heads=2, segment=5, chunk_size=4, n_persistent=2, dtype=torch.float64)
    compiled, counter = _compiled(block, "eager")
    for x in _texts(13, 14):
        torch.testing.assert_close(compiled(x)[0], block(x)[0])
    assert counter.frame_count == 2


@torch.no_grad()
def test_windows_are_exported_for_any_length():
    block = TitansMAG(12, heads=2, window=5, chunk_size=4, n_persistent=2, dtype=torch.float64)
    length = {1: torch.export.Dim("T", min=2, max=4096)}
    exported = torch.export.export(block, tuple(_texts(13)), dynamic_shapes=(length,)).module()
    for x in _texts(2, 5, 6, 10, 29):
        torch.testing.assert_close(exported(x)[0], block(x)[0])
