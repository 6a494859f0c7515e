"""Every mistake raises at the call: the message names the argument, what it got, what it takes."""

import dataclasses
import re

import pytest
import torch
from inputs import make_inputs
from yardstick import TOKENS

from titans_kernels import neural_memory, retrieve

B, T, H, D, HIDDEN, DEPTH, CHUNK = 2, 20, 2, 4, 6, 2, 16

# Arguments are named by their place: `q`, `weights[0]`, `initial_state.weights[1]`.
LABELS = {"norm[0]": "norm weight", "norm[1]": "norm bias"}


def _learn():
    """Arguments of neural_memory; the state has four tokens in its open chunk."""
    inputs = make_inputs(B, T, H, D, HIDDEN, DEPTH, requires_grad=False)
    _, state = neural_memory(**inputs, output_final_state=True)
    return inputs | {"initial_state": state, "output_final_state": True, "chunk_size": CHUNK}


def _read_state():
    inputs = _learn()
    return {"q": inputs["q"], "weights_or_state": inputs["initial_state"], "norm": inputs["norm"]}


def _read_weights():
    return _read_state() | {"weights_or_state": _learn()["weights"]}


def _with(arguments, place, change):
    """The arguments with another value at a place: `change`, or what it makes of the value."""
    head, *path = re.findall(r"\w+", place)

    def replaced(value, path):
        if not path:
            return change(value) if callable(change) else change
        if path[0].isdigit():
            i = int(path[0])
            return (*value[:i], replaced(value[i], path[1:]), *value[i + 1 :])
        return dataclasses.replace(value, **{path[0]: replaced(getattr(value, path[0]), path[1:])})

    return arguments | {head: replaced(arguments.get(head), path)}


def _check(op, arguments, place, change, error, message):
    with pytest.raises(error) as caught:
        op(**_with(arguments, place, change))
    want = f"{LABELS.get(place, place)}: {message}"
    assert str(caught.value).startswith(want), f"{caught.value}\nis not\n{want}"
    assert "takes" in str(caught.value)


# ------------------------------------------------------------------- one tensor like the next

FIELDS = ("weights[0]", "weights[1]", "momentum[0]", "momentum[1]", "k", "v")
FIELDS += ("theta", "alpha", "eta", "length")
SHARED = ("q", "norm[0]", "norm[1]")
TENSORS = [
    *((neural_memory, _learn, name) for name in (*SHARED, "k", "v", "theta", "alpha", "eta")),
    *((neural_memory, _learn, f"weights[{i}]") for i in range(DEPTH)),
    *((neural_memory, _learn, f"initial_state.{name}") for name in FIELDS),
    *((retrieve, _read_weights, name) for name in SHARED),
    *((retrieve, _read_weights, f"weights_or_state[{i}]") for i in range(DEPTH)),
    *((retrieve, _read_state, f"weights_or_state.{name}") for name in FIELDS),
]
NAMES = [f"{op.__name__} {place}" for op, _, place in TENSORS]


@pytest.mark.parametrize("op, arguments, place", TENSORS, ids=NAMES)
def test_what_is_no_tensor(op, arguments, place):
    for value, got in ((None, "NoneType"), (0.5, "float"), ([0.5], "list")):
        _check(op, arguments(), place, value, TypeError, f"got {got}, takes a torch.Tensor")


@pytest.mark.parametrize("op, arguments, place", TENSORS, ids=NAMES)
def test_a_tensor_of_another_kind_of_number(op, arguments, place):
    kinds = (torch.int8, torch.bool, torch.complex64)
    if place.endswith("length"):
        kinds = (torch.float32, torch.bool)
    for dtype in kinds:
        message = f"got dtype {dtype}, takes "
        _check(op, arguments(), place, lambda x, dtype=dtype: x.to(dtype), TypeError, message)


@pytest.mark.parametrize("op, arguments, place", TENSORS, ids=NAMES)
def test_a_tensor_of_another_rank(op, arguments, place):
    for change in (lambda x: x[0], lambda x: x[None, None]):
        got = list(change(_at(arguments(), place)).shape)
        _check(op, arguments(), place, change, ValueError, f"got shape {got}, takes ")


@pytest.mark.parametrize("op, arguments, place", TENSORS, ids=NAMES)
def test_a_tensor_on_another_device(op, arguments, place):
    if place == "q":  # all others are elsewhere then: the first one says so
        place = "k" if op is neural_memory else "norm[0]"
        given, message = arguments(), f"{LABELS.get(place, place)}: got device cpu, takes "
        with pytest.raises(ValueError, match=re.escape(message)):
            op(**given | {"q": given["q"].to("meta")})
    else:
        message = "got device meta, takes that of q, cpu"
        _check(op, arguments(), place, lambda x: x.to("meta"), ValueError, message)


def _at(arguments, place):
    head, *path = re.findall(r"\w+", place)
    value = arguments[head]
    for step in path:
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    return value


# ------------------------------------------------------------------------ one case like no other


def _wider(x):
    return torch.cat([x, x], -1)


def _later(x):
    return x[:, 1:]


def _nested(x):
    return torch.nested.nested_tensor(list(x))


def _jagged(x):
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


LEARN_VALUES = [
    ("q", lambda x: x[:, :, :0], "got shape [2, 20, 0, 4], takes [B, T, H, D] with H, D >= 1"),
    ("q", lambda x: x[..., :0], "got shape [2, 20, 2, 0], takes [B, T, H, D] with H, D >= 1"),
    ("k", _later, "got shape [2, 19, 2, 4], takes that of q, [B, T, H, D] = [2, 20, 2, 4]"),
    ("k", _wider, "got shape [2, 20, 2, 8], takes that of q, [B, T, H, D] = [2, 20, 2, 4]"),
    ("v", lambda x: x[:1], "got shape [1, 20, 2, 4], takes that of q"),
    ("v", lambda x: x[:, :, :1], "got shape [2, 20, 1, 4], takes that of q"),
    ("theta", _later, "got shape [2, 19, 2], takes [B, T, H] = [2, 20, 2] or [B, T, H, L] = [2, "),
    ("alpha", lambda x: x[:, :, :1], "got shape [2, 20, 1], takes [B, T, H] = [2, 20, 2]"),
    ("eta", lambda x: torch.stack([x] * 3, -1), "got shape [2, 20, 2, 3], takes [B, T, H]"),
    ("weights[0]", lambda x: x[:1], "got shape [1, 4, 6], takes [H, d_in, d_out] = [2, 4, d_out]"),
    ("weights[0]", lambda x: x[:, 1:], "got shape [2, 3, 6], takes [H, d_in, d_out] = [2, 4, d_"),
    ("weights[0]", lambda x: x[..., :0], "got shape [2, 4, 0], takes [H, d_in, d_out] = [2, 4,"),
    ("weights[1]", lambda x: x[:, 1:], "got shape [2, 5, 4], takes [H, d_in, d_out] = [2, 6, 4]"),
    ("weights[1]", _wider, "got shape [2, 6, 8], takes [H, d_in, d_out] = [2, 6, 4]"),
    ("norm[0]", _later, "got shape [2, 3], takes [H, D] = [2, 4]"),
    ("norm[1]", lambda x: x[:1], "got shape [1, 4], takes [H, D] = [2, 4]"),
    ("activation", "tanh", "got 'tanh', takes one of 'gelu_tanh', 'gelu', 'silu', 'relu', 'id"),
    ("activation", None, "got None, takes one of 'gelu_tanh'"),
    ("backend", "cuda", "got 'cuda', takes one of 'auto', 'torch', 'triton'"),
    ("backend", None, "got None, takes one of 'auto', 'torch', 'triton'"),
    ("chunk_size", 0, "got 0, takes an int of at least 1"),
    ("chunk_size", -16, "got -16, takes an int of at least 1"),
    (
        "chunk_size",
        10**9,
        "got 1000000000, takes at most 65536 where there is a state",
    ),
]
LEARN_TYPES = [
    ("k", lambda x: x.float(), "got dtype torch.float32, takes that of q, torch.float64"),
    ("v", lambda x: x.half(), "got dtype torch.float16, takes that of q, torch.float64"),
    ("weights", lambda x: x[0], "got Tensor, takes a tuple of at least one [H, d_in, d_out]"),
    ("weights", (), "got none, takes a tuple of at least one [H, d_in, d_out]"),
    ("weights", None, "got NoneType, takes a tuple of at least one"),
    ("norm", lambda x: x[0], "got Tensor, takes None or a pair (weight, bias), [H, D] each"),
    ("norm", lambda x: (*x, x[0]), "got tuple of 3, takes None or a pair"),
    ("norm", True, "got bool, takes None or a pair"),
    ("residual", 1, "got 1, takes True or False"),
    ("residual", None, "got None, takes True or False"),
    ("output_final_state", "yes", "got 'yes', takes True or False"),
    ("chunk_size", True, "got True, takes an int of at least 1"),
    ("chunk_size", 16.0, "got 16.0, takes an int of at least 1"),
    ("chunk_size", None, "got None, takes an int of at least 1"),
    ("q", lambda x: x.to_sparse(), "got a tensor of layout sparse_coo, takes a dense one"),
    ("q", lambda x: x.float().to_mkldnn(), "got a tensor of layout _mkldnn, takes a dense one"),
    ("q", _jagged, "got a tensor of layout nested, takes a dense one, strided"),
    ("k", _nested, "got a tensor of layout nested, takes a dense one, strided"),
    ("theta", lambda x: x.to_sparse(), "got a tensor of layout sparse_coo, takes a dense one"),
    ("weights[1]", lambda x: x.to_sparse(), "got a tensor of layout sparse_coo, takes a dense"),
    ("norm[1]", lambda x: x.to_sparse(), "got a tensor of layout sparse_coo, takes a dense one"),
    ("initial_state", lambda s: (s.weights, s.momentum), "got tuple, takes a MemoryState"),
]
STATE_VALUES = [
    ("momentum", (), "got 0 layers, takes 2"),
    ("weights[0]", lambda x: x[:1], "got shape [1, 2, 4, 6], takes [N, H, d_in, d_out] = [2, 2, 4"),
    ("weights[1]", _wider, "got shape [2, 2, 6, 8], takes [N, H, d_in, d_out] = [2, 2, 6, 4]"),
    ("weights[1]", _later, "got shape [2, 1, 6, 4], takes [N, H, d_in, d_out] = [2, 2, 6, 4]"),
    ("momentum[0]", lambda x: x[:, :1], "got shape [2, 1, 4, 6], takes [N, H, d_in, d_out]"),
    ("k", lambda x: x[:1], "got shape [1, 16, 2, 4], takes [N, chunk_size, H, D] = [2, 16, 2, 4]"),
    ("k", lambda x: x[:, :0], "got shape [2, 0, 2, 4], takes [N, chunk_size, H, D] = [2, 1, 2, 4]"),
    ("v", _later, "got shape [2, 15, 2, 4], takes [N, chunk_size, H, D] = [2, 16, 2, 4]"),
    ("alpha", _later, "got shape [2, 15, 2], takes [N, chunk_size, H] or [N, chunk_size, H, L] ="),
    ("eta", lambda x: torch.stack([x] * 2, -1), "got shape [2, 16, 2, 2], takes [N, chunk_size"),
    ("length", lambda x: x[:1], "got shape [1], takes [N] = [2]"),
    ("length", lambda x: x + 12, "got [16, 16], takes values from 0 to chunk_size - 1 = 15"),
    ("length", lambda x: x - 5, "got [-1, -1], takes values from 0 to chunk_size - 1 = 15"),
]
STATE_TYPES = [
    ("weights", None, "got NoneType, takes a tuple of [N, H, d_in, d_out] tensors"),
    ("momentum", lambda x: x[0], "got Tensor, takes a tuple of [N, H, d_in, d_out] tensors"),
    ("k", lambda x: x.float(), "got dtype torch.float32, takes that of q, torch.float64"),
    ("v", lambda x: x.bfloat16(), "got dtype torch.bfloat16, takes that of q, torch.float64"),
    ("weights[0]", lambda x: x.to_sparse(), "got a tensor of layout sparse_coo, takes a dense"),
    ("length", lambda x: x.to_sparse(), "got a tensor of layout sparse_coo, takes a dense one"),
]


def _rows(values, types, skip=()):
    """The rows of two tables with their errors and readable ids."""
    rows = [(*row, ValueError) for row in values] + [(*row, TypeError) for row in types]
    return [
        pytest.param(place, change, error, message, id=f"{place} {message.split(', takes')[0]}")
        for place, change, message, error in rows
        if not place.startswith(skip)
    ]


@pytest.mark.parametrize("place, change, error, message", _rows(LEARN_VALUES, LEARN_TYPES))
def test_neural_memory(place, change, error, message):
    _check(neural_memory, _learn(), place, change, error, message)


NOT_READ = ("k", "v", "theta", "alpha", "eta", "weights", "chunk_size", "initial_state", "output")


@pytest.mark.parametrize(
    "place, change, error, message", _rows(LEARN_VALUES, LEARN_TYPES, NOT_READ)
)
@pytest.mark.parametrize("arguments", [_read_weights, _read_state])
def test_retrieve(arguments, place, change, error, message):
    _check(retrieve, arguments(), place, change, error, message)


@pytest.mark.parametrize(
    "place, change, error, message",
    [row for row in _rows(LEARN_VALUES, LEARN_TYPES) if row.values[0].startswith("weights")],
)
def test_retrieve_from_weights(place, change, error, message):
    place = place.replace("weights", "weights_or_state")
    _check(retrieve, _read_weights(), place, change, error, message)


@pytest.mark.parametrize("place, change, error, message", _rows(STATE_VALUES, STATE_TYPES))
@pytest.mark.parametrize("op", [neural_memory, retrieve])
def test_a_state(op, place, change, error, message):
    name, arguments = "initial_state", _learn()
    if op is retrieve:
        name, arguments = "weights_or_state", _read_state()
    _check(op, arguments, f"{name}.{place}", change, error, message)


def test_a_state_of_another_run():
    """Another number of sequences, another chunk, other gates, another depth."""
    given, state = _learn(), _learn()["initial_state"]

    def other(message, **changes):
        with pytest.raises(ValueError, match=re.escape(message)):
            neural_memory(**given | changes)

    one = state.index_select(torch.tensor([0]))
    other("weights[0]: got shape [1, 2, 4, 6], takes [N, H, d_in, d_out] = [2, ", initial_state=one)
    other("initial_state: got chunks of 16 tokens, takes chunk_size = 8", chunk_size=8)
    gates = {name: torch.stack([given[name]] * DEPTH, -1) for name in ("theta", "alpha", "eta")}
    other("initial_state.theta: got shape [2, 16, 2], takes", **gates)
    deep = make_inputs(B, T, H, D, HIDDEN, 3, requires_grad=False)["weights"]
    other("initial_state.weights: got 2 layers, takes 3", weights=deep)
    none = dataclasses.replace(state, weights=(), momentum=())
    other("initial_state.weights: got 0 layers, takes 2", initial_state=none)
    with pytest.raises(ValueError, match=r"weights_or_state\.weights: got 0 layers, takes 1"):
        retrieve(given["q"], none)


def test_gates_of_two_kinds():
    given = _learn() | {"initial_state": None}
    given["eta"] = torch.stack([given["eta"]] * DEPTH, -1)
    message = "theta, alpha, eta: got ranks theta 3, alpha 3, eta 4, takes the same shape for all"
    with pytest.raises(ValueError, match=message):
        neural_memory(**given)


# -------------------------------------------------------------------------- packed sequences

CU_SEQLENS = [
    ([0, 20], TypeError, "got list, takes a torch.Tensor"),
    (torch.tensor([0.0, 20.0]), TypeError, "got dtype torch.float32, takes int32 or int64"),
    (torch.tensor([False, True]), TypeError, "got dtype torch.bool, takes int32 or int64"),
    (torch.tensor([0, 20], dtype=torch.int16), TypeError, "got dtype torch.int16, takes int32"),
    (torch.tensor([[0, 20]]), ValueError, "got shape [1, 2], takes [N + 1]"),
    (torch.tensor(20), ValueError, "got shape [], takes [N + 1]"),
    (torch.tensor([], dtype=torch.int32), ValueError, "got shape [0], takes [N + 1]"),
    (torch.tensor([1, 20]), ValueError, "got 1 first and 20 last, takes 0 first and T = 20 last"),
    (torch.tensor([0, 19]), ValueError, "got 0 first and 19 last, takes 0 first and T = 20 last"),
    (torch.tensor([0, 21]), ValueError, "got 0 first and 21 last, takes 0 first and T = 20 last"),
    (torch.tensor([0]), ValueError, "got 0 first and 0 last, takes 0 first and T = 20 last"),
    *(
        (torch.tensor(ends), ValueError, f"got {ends}, takes values that never fall")
        for ends in ([0, 12, 11, 20], [0, -1, 20], [0, 21, 20], [0, 20, 0, 20])
    ),
    (
        torch.tensor([0, 20], device="meta"),
        ValueError,
        "got device meta, takes the CPU or that of q",
    ),
]


@pytest.mark.parametrize("value, error, message", CU_SEQLENS, ids=[row[2] for row in CU_SEQLENS])
@pytest.mark.parametrize("op", [neural_memory, retrieve])
def test_cu_seqlens(op, value, error, message):
    given = _learn() | {"initial_state": None} if op is neural_memory else _read_weights()
    given |= {name: given[name][:1] for name in TOKENS if name in given}
    _check(op, given, "cu_seqlens", value, error, message)


@pytest.mark.parametrize("op", [neural_memory, retrieve])
def test_cu_seqlens_with_a_batch(op):
    given = _learn() if op is neural_memory else _read_state()
    with pytest.raises(ValueError, match="q: got batch 2, takes 1 together with cu_seqlens"):
        op(**given, cu_seqlens=torch.tensor([0, 20]))


# -------------------------------------------------------------------------------- what is left


@pytest.mark.parametrize("op", [neural_memory, retrieve])
def test_a_keyword_that_does_not_exist(op):
    given = _learn() if op is neural_memory else _read_state()
    with pytest.raises(TypeError, match=f"{op.__name__}.*unexpected keyword argument 'chunksize'"):
        op(**given, chunksize=16)


@pytest.mark.parametrize("op", [neural_memory, retrieve])
def test_a_backend_that_is_named_does_not_fall_back(op):
    """A head dimension of 4 is too small for Triton's tiles, whatever the machine."""
    given = _learn() if op is neural_memory else _read_state()
    with pytest.raises(NotImplementedError, match="backend: got 'triton', which takes"):
        op(**given, backend="triton")


def test_what_is_no_mistake():
    """Gates, weights, norm and a state's fields may have dtypes of their own; tuples be lists."""
    given = make_inputs(B, T, H, D, HIDDEN, DEPTH, requires_grad=False, dtype=torch.bfloat16)
    wide = make_inputs(B, T, H, D, HIDDEN, DEPTH, requires_grad=False)
    given["weights"] = [given["weights"][0].half(), wide["weights"][1]]
    given |= {"theta": wide["theta"], "alpha": wide["alpha"].float(), "norm": list(wide["norm"])}
    o, state = neural_memory(**given, output_final_state=True)
    assert {o.dtype, state.k.dtype, state.v.dtype, state.eta.dtype} == {torch.bfloat16}
    assert {x.dtype for x in (*state.weights, *state.momentum)} == {torch.float32}
    assert (state.theta.dtype, state.alpha.dtype) == (torch.float64, torch.float32)
    again, _ = neural_memory(
        **given, initial_state=dataclasses.replace(state, length=state.length.long())
    )
    assert again.isfinite().all() and retrieve(given["q"], state).dtype == torch.bfloat16
