"""The operator against the definition, and against judges that share nothing with either."""

import os
import random
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import make_inputs
from torch.utils import _pytree as pytree
from yardstick import (
    TOKENS,
    assert_gradients,
    assert_values,
    assert_within_yardstick,
    blocks_of,
    flat,
    gradients,
    measure,
    plain_autograd,
    rounded,
    rounded_inputs,
)

import reference
from titans_kernels import MemoryState, neural_memory

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu", "identity")


@dataclass(frozen=True)
class Case:
    edge: str  # what the row stresses
    T: int = 40
    chunk: int = 16
    depth: int = 2
    norm: bool = True
    residual: bool = True
    activation: str = "gelu_tanh"
    per_layer: bool = False  # gates
    block: str | int = "cpu"
    B: int = 1
    H: int = 2
    D: int = 4
    hidden: int = 6
    lengths: tuple[int, ...] | None = None  # of packed sequences, T in all
    past: tuple[int, ...] | None = None  # tokens that each sequence has behind it
    gates: dict = field(default_factory=dict)  # name: (value, share of tokens that have it)
    seed: int = 0

    def __str__(self):
        return self.edge


def _sizes():
    """Every length with every chunk; the other settings take turns, each meeting each."""
    rows, turn = [], random.Random(0)
    edges = {0: "no token", 1: "one token", 15: "one short of 16", 16: "16", 17: "one over 16"}
    for T in (0, 1, 15, 16, 17, 100, 257):
        for chunk in (1, 3, 16, 64, 100, 300):
            case = Case(
                "",
                T,
                chunk,
                depth=turn.choice((1, 2, 3, 4) if T < 257 else (1, 2)),
                norm=turn.random() < 0.6,
                residual=turn.random() < 0.6,
                activation=turn.choice(ACTIVATIONS),
                per_layer=turn.random() < 0.5,
                block=turn.choice(("cpu", "cuda")),
                H=1 if T == 257 else 2,
            )
            parts = [edges.get(T, f"{T}"), f"chunk {chunk}", f"{case.block} block"]
            parts += [f"depth {case.depth}", case.activation]
            parts += [name for name in ("norm", "residual", "per_layer") if getattr(case, name)]
            rows.append(replace(case, edge=" ".join(parts)))
    return rows


NETWORKS = [
    Case(
        f"depth {depth} {activation} {block} block",
        40,
        5,
        depth,
        activation=activation,
        block=block,
        **options,
    )
    for depth, activation, block, options in (
        (1, "identity", "cuda", {"norm": False, "residual": False}),
        (1, "relu", "cuda", {"per_layer": True}),
        (2, "gelu_tanh", "cuda", {"per_layer": True, "B": 2}),
        (2, "gelu", "cuda", {"residual": False}),
        (2, "silu", "cuda", {"norm": False}),
        (2, "relu", "cuda", {"norm": False, "residual": False}),
        (2, "identity", "cuda", {}),
        (3, "gelu_tanh", "cpu", {"norm": False}),
        (3, "gelu", "cuda", {"per_layer": True}),
        (3, "silu", "cuda", {"residual": False}),
        (4, "relu", "cuda", {"per_layer": True, "norm": False}),
        (4, "identity", "cpu", {}),
        (4, "gelu_tanh", "cuda", {"B": 2}),
    )
]

SHAPES = [
    Case("width 1 throughout", 19, 4, D=1, hidden=1, H=1, norm=False, block="cuda"),
    Case("hidden narrower than D", 19, 4, D=5, hidden=2, depth=3),
    Case("one head of three rows", 37, 16, H=1, B=3, block="cuda"),
    Case("block that the chunk does not divide", 70, 5, block=13),
    Case("chunk over three uneven blocks", 70, 10, block=4, per_layer=True),
    Case("chunk one longer than the block", 150, 65, block="cuda"),
]

GATES = [
    Case(f"{edge}, {block} block", 40, 5, block=block, gates=gates, per_layer=per_layer)
    for edge, gates, per_layer in (
        ("alpha 1 at some tokens", {"alpha": (1.0, 0.3)}, False),
        ("alpha 1 at all", {"alpha": (1.0, 1.0)}, False),
        ("alpha 0 at all", {"alpha": (0.0, 1.0)}, False),
        ("eta 0 at some", {"eta": (0.0, 0.3)}, True),
        ("eta 0 at all", {"eta": (0.0, 1.0)}, False),
        ("theta 0 at some", {"theta": (0.0, 0.3)}, False),
        ("theta 0 at all", {"theta": (0.0, 1.0)}, False),
        (
            "all at their bounds",
            {"alpha": (1.0, 0.3), "eta": (0.0, 0.3), "theta": (0.0, 0.3)},
            True,
        ),
        ("nothing happens", {"alpha": (0.0, 1.0), "eta": (0.0, 1.0), "theta": (0.0, 1.0)}, False),
    )
    for block in ("cpu", "cuda")
]

STATES = [
    Case("goes on at a whole chunk", past=(32,)),
    Case("goes on in an open chunk", past=(21,), block="cuda"),
    Case("one token more", T=1, past=(21,), norm=False),
    Case("no token more", T=0, past=(21,)),
    Case("no token more, whole chunks", T=0, past=(32,)),
    Case("the open chunk stays open", T=3, past=(5,), block="cuda"),
    Case("rows at phases of their own", T=30, past=(0, 3, 20), B=3, block="cuda", per_layer=True),
    Case("an open chunk over two blocks", T=60, chunk=40, past=(25, 39), B=2),
    Case("packed", T=60, lengths=(17, 0, 1, 42), block="cuda"),
    Case("packed, all empty but one", T=33, lengths=(0, 33, 0)),
    Case("packed, going on", T=60, lengths=(17, 0, 1, 42), past=(3, 5, 16, 40), block="cuda"),
    Case("packed, chunk over two blocks", T=150, chunk=70, lengths=(71, 9, 70), past=(0, 69, 71)),
]


def _inputs(case):
    """Arguments of both operators; leaves, an initial state's tensors included."""
    make = partial(
        make_inputs,
        norm=case.norm,
        per_layer_gates=case.per_layer,
        seed=case.seed,
        depth=case.depth,
    )
    sizes = {"H": case.H, "D": case.D, "hidden": case.hidden}
    lengths = None if case.lengths is None else list(case.lengths)
    inputs = make(B=case.B, T=case.T, lengths=lengths, **sizes)
    generator = torch.Generator().manual_seed(case.seed + 1)
    for name, (value, share) in case.gates.items():
        chosen = torch.rand(inputs[name].shape, generator=generator) < share
        inputs[name].data.masked_fill_(chosen, value)
    inputs |= {"activation": case.activation, "residual": case.residual, "chunk_size": case.chunk}
    if case.past is not None:
        past = make(
            B=1, T=sum(case.past), lengths=list(case.past), requires_grad=False, **sizes
        ) | {name: inputs[name] for name in ("activation", "residual", "chunk_size")}
        _, state = reference.neural_memory(**past, output_final_state=True)
        inputs["initial_state"] = MemoryState(*state).map(
            lambda x: x.requires_grad_() if x.is_floating_point() else x
        )
    return inputs


def _check(case):
    inputs = _inputs(case)
    want = measure(reference.neural_memory, inputs)
    with blocks_of(case.block):
        got = measure(neural_memory, inputs)
    assert_values(got.values, want.values)
    assert_gradients(got.gradients, want.gradients)


@pytest.mark.parametrize("case", [*_sizes(), *NETWORKS, *SHAPES, *GATES, *STATES], ids=str)
def test_float64_equals_the_reference(case):
    _check(case)


@st.composite
def _cases(draw):
    lengths = draw(st.none() | st.lists(st.integers(0, 30), min_size=1, max_size=3).map(tuple))
    B = 1 if lengths else draw(st.integers(1, 2))
    rows = len(lengths) if lengths else B
    past = st.lists(st.integers(0, 20), min_size=rows, max_size=rows).map(tuple)
    norm = draw(st.booleans())
    bounds = st.tuples(st.just(1.0) | st.just(0.0), st.floats(0, 1))
    return Case(
        "",
        T=sum(lengths) if lengths else draw(st.integers(0, 50)),
        chunk=draw(st.integers(1, 40)),
        depth=draw(st.integers(1, 4)),
        norm=norm,
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        per_layer=draw(st.booleans()),
        block=draw(st.sampled_from(("cpu", "cuda")) | st.integers(1, 70)),
        B=B,
        H=draw(st.integers(1, 2)),
        # A norm takes away all slope over 2 entries, and that of what only scales its input.
        D=draw(st.integers(4 if norm else 1, 5)),
        hidden=draw(st.integers(3 if norm else 1, 8)),
        lengths=lengths,
        past=draw(st.none() | past),
        gates={"alpha": draw(bounds)} if draw(st.booleans()) else {},
        seed=draw(st.integers(0, 1000)),
    )


@torch.no_grad()
def _is_stable(case):
    """Whether the inner loop leaves a small error small."""
    inputs = _inputs(case)
    o, _ = reference.neural_memory(**inputs)
    inputs["k"] = inputs["k"] + 1e-10 * torch.randn_like(inputs["k"])
    moved, _ = reference.neural_memory(**inputs)
    return bool(((moved - o).abs() < 100 * 1e-10).all())


@settings(max_examples=25, deadline=None, derandomize="CI" in os.environ)
@given(_cases())
def test_float64_equals_the_reference_anywhere(case):
    assume(_is_stable(case))
    _check(case)


@pytest.mark.parametrize("block", ["cpu", "cuda"])
def test_a_chunk_beyond_any_sequence_is_one_of_its_length(block):
    inputs = make_inputs(1, 150, 1, 4, 6, 2)
    with blocks_of(block):
        o, _ = neural_memory(**inputs, chunk_size=10**9)
        want, _ = neural_memory(**inputs, chunk_size=150)
    assert_values({"o": o}, {"o": want})


# ------------------------------------------------------------------ derivatives of every kind


def _tiny(T, chunk, past, per_layer=False):
    """The operator as a function of leaves, and those leaves: a state's are among them."""
    case = Case("", T, chunk, per_layer=per_layer, past=past, H=1, D=2, hidden=3)
    inputs = _inputs(case)
    parts, spec = pytree.tree_flatten(inputs)
    places = [i for i, x in enumerate(parts) if torch.is_tensor(x) and x.requires_grad]

    def op(*leaves):
        given = dict(enumerate(parts)) | dict(zip(places, leaves, strict=True))
        given = pytree.tree_unflatten(list(given.values()), spec)
        o, final = neural_memory(**given, output_final_state=True)
        return tuple(flat({"o": o, "final": final}).values())

    return op, [parts[i] for i in places]


TINY = {  # block, T, chunk, past
    "two chunks to a block": (4, 4, 2, None),
    "going on, two chunks to a block": (4, 4, 2, (3,)),
    "going on, a chunk over two blocks": (2, 4, 3, (4,)),
}


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("sizes", TINY.values(), ids=TINY)
def test_gradients_are_those_of_finite_differences(sizes, per_layer):
    block, *sizes = sizes
    with blocks_of(block):
        assert torch.autograd.gradcheck(*_tiny(*sizes, per_layer))


@pytest.mark.parametrize("sizes", TINY.values(), ids=TINY)
def test_second_derivatives_are_those_of_finite_differences(sizes):
    block, *sizes = sizes
    with blocks_of(block):
        assert torch.autograd.gradgradcheck(*_tiny(*sizes), fast_mode=True)


def test_differentiable_gradients_are_the_gradients():
    """Also where one input is made from another: the state from the norm, the values from keys."""
    inputs = make_inputs(1, 20, 1, 4, 6, 2)
    options = {"chunk_size": 8, "norm": inputs["norm"], "weights": inputs["weights"]}
    tokens = {name: inputs[name] for name in TOKENS}
    tokens["v"] = tokens["v"] + tokens["k"] * inputs["norm"][0]
    _, state = neural_memory(**tokens, **options, output_final_state=True)
    o, final = neural_memory(**tokens, **options, initial_state=state, output_final_state=True)
    values = flat({"o": o, "final": final})
    want = gradients(values, flat(inputs), retain_graph=True)
    assert_gradients(gradients(values, flat(inputs), create_graph=True), want, 1e-12)


def test_only_the_state_may_have_gradients():
    inputs = _inputs(Case("", 20, past=(21,)))
    want = measure(neural_memory, inputs)
    for name, leaf in flat(inputs).items():
        leaf.requires_grad_(name.startswith("initial_state"))
    got = measure(neural_memory, inputs)
    assert_gradients(got.gradients, {n: want.gradients[n] for n in got.gradients}, 1e-14)


# -------------------------------------------------------------------------- other judges


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("block", ["cpu", "cuda"])
def test_titans_pytorch_agrees(chunk, block):
    from peer import titans_pytorch_outputs

    inputs = make_inputs(1, 200, 2, 8, 32, 2, norm=False)
    del inputs["norm"]
    leaves = flat(inputs)
    with blocks_of(block):
        o, _ = neural_memory(**inputs, activation="gelu", residual=False, chunk_size=chunk)
        found = gradients({"o": o}, leaves)
    theirs, *_ = titans_pytorch_outputs(**inputs, chunk_size=chunk)
    assert_values({"o": o}, {"o": theirs}, 1e-10)
    assert_gradients(found, gradients({"o": theirs}, leaves), 1e-10)


# ------------------------------------------------------------------------ shorter dtypes


DTYPE_CASES = {
    "chunks of 16": {"chunk": 16, "block": "cpu"},
    "many chunks to a block": {"chunk": 16, "block": "cuda"},
    "short chunks": {"chunk": 4, "block": "cuda"},
    "one chunk over blocks": {"chunk": 40, "block": 16},
    "linear memory": {"chunk": 16, "block": "cuda", "depth": 1, "norm": False},
}


def _measure_rounded(dtype, seed, chunk, block, depth=2, norm=True):
    """What operator, definition and a third form make of inputs rounded to `dtype`."""
    inputs, exact = rounded_inputs(
        dtype, seed=seed, B=1, T=80, H=2, D=8, hidden=16, depth=depth, norm=norm
    )
    with blocks_of(block):
        got = measure(neural_memory, inputs, chunk_size=chunk)
        if dtype == torch.float32:
            with plain_autograd():
                other = measure(neural_memory, inputs, chunk_size=chunk)
        else:
            other = measure(partial(_rounded_operator, dtype), exact, chunk_size=chunk)
    return got, measure(reference.neural_memory, exact, chunk_size=chunk), other


def _rounded_operator(dtype, output_final_state, **inputs):
    return rounded(**inputs, dtype=dtype)


@pytest.mark.parametrize("options", DTYPE_CASES.values(), ids=DTYPE_CASES)
def test_the_yardstick_without_rounding_is_the_reference(options):
    _, want, yard = _measure_rounded(torch.float64, 0, **options)
    assert_values(yard.values, {name: want.values[name] for name in yard.values})
    assert_gradients(yard.gradients, want.gradients)


@pytest.mark.parametrize("options", DTYPE_CASES.values(), ids=DTYPE_CASES)
def test_float32_loses_what_plain_autograd_loses(options):
    runs = [_measure_rounded(torch.float32, seed, **options) for seed in range(3)]
    for kind in (0, 1):
        for name in runs[0][1][kind]:
            got, want, other = (
                torch.cat([run[i][kind][name].double().flatten() for run in runs]) for i in range(3)
            )
            assert_within_yardstick(name, got, want, other, rms=4.0, largest=4.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", DTYPE_CASES.values(), ids=DTYPE_CASES)
def test_half_precision_by_the_yardstick(options, dtype):
    got, want, yard = _measure_rounded(dtype, 0, **options)
    for kind in (0, 1):
        for name, exact in yard[kind].items():
            assert_within_yardstick(name, got[kind][name], want[kind][name], exact)
    assert got.values["o"].dtype == got.gradients["q"].dtype == dtype
    assert (
        got.values["state.weights[0]"].dtype == got.gradients["weights[0]"].dtype == torch.float32
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_relu_has_a_slope_of_0_at_0(backend):
    """Two hidden units are 0 at every key: to learn from them, or not, is another memory."""
    inputs = make_inputs(1, 12, 1, 16, 16, 2)
    with torch.no_grad():
        inputs["weights"][0][..., :2] = 0.0
    options = {"activation": "relu", "chunk_size": 4}
    want = measure(reference.neural_memory, inputs, **options)
    got = measure(neural_memory, inputs, **options, backend=backend)
    assert_values(got.values, want.values)
    assert_gradients(got.gradients, want.gradients)
