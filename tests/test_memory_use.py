"""What training keeps, and the ways in which PyTorch runs an operator."""

from functools import partial
from itertools import accumulate
from math import ceil

import pytest
import torch
from inputs import make_inputs
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from yardstick import (
    TOKENS,
    assert_gradients,
    assert_values,
    blocks_of,
    cotangents,
    flat,
    gradients,
    measure,
)

from titans_kernels import MemoryState, neural_memory, retrieve
from titans_kernels.chunked.layout import block_size

# ------------------------------------------------------------------------------------- memory


def _storages(tensors):
    return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def _peak(function):
    """Bytes that the function has allocated at most, at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    return max(accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())))


def _bytes_of_states(T, chunk, inputs):
    """Two states (running and anchor) for every span of blocks, one where they agree; and two."""
    size = block_size(chunk, torch.device("cpu"))
    blocks = ceil(T / size.tokens) if size.blocks == 1 else ceil(T / chunk * size.blocks)
    state = 2 * sum(w.nbytes for w in inputs["weights"])
    return (1 if size.blocks == 1 else 2) * (blocks // size.span + 2) * state


def _long(T):
    """Inputs whose weights are large compared with a token."""
    return make_inputs(1, T, 1, 16, 256, 2, dtype=torch.float32)


@pytest.mark.parametrize("chunk", [1, 16, 64, 100, 300])
@pytest.mark.parametrize("T", [256, 1024, 4096])
def test_what_is_kept_are_few_states(T, chunk):
    """Beyond the inputs: a state for every span of blocks, and nothing per token."""
    inputs, kept = _long(T), {}

    def keep(x):
        kept.update(_storages([x]))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = neural_memory(**inputs, chunk_size=chunk, output_final_state=True)
    own, limit = _storages(flat(inputs).values()), _bytes_of_states(T, chunk, inputs) + 16 * T
    found = sum(size for where, size in kept.items() if where not in own)
    assert found <= limit, f"kept {found} bytes, limit {limit}"
    assert result[1] is not None


@pytest.mark.parametrize("chunk, T", [(1, 512), (16, 2048), (64, 4096), (100, 4096)])
def test_training_never_needs_weights_of_every_chunk_or_token(chunk, T):
    peaks = []
    for length in (T // 4, T):
        inputs = _long(length)

        def train(inputs=inputs):
            o, _ = neural_memory(**inputs, chunk_size=chunk)
            gradients({"o": o}, flat(inputs))

        peaks.append(_peak(train))
    state = 2 * sum(w.nbytes for w in inputs["weights"])
    of_chunks = T // chunk * state
    of_tokens = T * (16 + 256) * 4  # one input of each layer
    limit = of_chunks // 2 + 2 * of_tokens
    assert peaks[1] <= limit, f"peak {peaks[1]} bytes, limit {limit}"
    assert peaks[1] <= 2.6 * peaks[0], f"{peaks[1] / peaks[0]:.1f} times as much for 4 times T"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_nothing_is_kept(mode):
    peaks = []
    for needed in (False, True):
        inputs = _long(1024)
        for leaf in flat(inputs).values():
            leaf.requires_grad_(needed)
        with mode():
            peaks.append(_peak(partial(neural_memory, **inputs)))
    assert peaks[0] == peaks[1]


# --------------------------------------------------------------------------------- ways of use


GROUPS = {
    "queries": ("q",),
    "keys": ("k",),
    "values": ("v",),
    "gates": ("theta", "alpha", "eta"),
    "one gate": ("alpha",),
    "weights": ("weights[0]", "weights[1]"),
    "norm": ("norm[0]", "norm[1]"),
    "norm bias": ("norm[1]",),
    "nothing": (),
}


@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_a_subset_of_gradients_is_part_of_all(names):
    inputs = make_inputs(1, 37, 2, 4, 6, 2)
    want = measure(neural_memory, inputs)
    for name, leaf in flat(inputs).items():
        leaf.requires_grad_(name in names)
    o, state = neural_memory(**inputs, output_final_state=True)
    values, leaves = flat({"o": o, "state": state}), {n: flat(inputs)[n] for n in names}
    assert_values(values, want.values, 0.0)
    assert o.requires_grad == bool(names)
    if names:
        assert_gradients(gradients(values, leaves), {n: want.gradients[n] for n in names}, 1e-14)


@pytest.fixture(params=[(16, "cpu"), (16, "cuda"), (100, "cpu")], ids=str)
def run(request):
    """Inputs over several spans, and a function that measures an operator on them."""
    chunk, block = request.param
    inputs = make_inputs(2, 230, 2, 4, 6, 2, dtype=torch.float32)

    def measured(op=neural_memory, inputs=inputs):
        with blocks_of(block):
            return measure(op, inputs, chunk_size=chunk)

    return inputs, measured


def _assert_equal(got, want, bound=0.0):
    assert_values(got.values, want.values, bound)
    assert_gradients(got.gradients, want.gradients, bound)


def test_a_run_again_is_the_same_to_the_bit(run):
    _assert_equal(run[1](), run[1]())


def test_gradients_may_be_taken_twice(run):
    """Nothing that is kept is written to, by the pass forward or back."""
    inputs, measured = run
    twice = []

    def op(**options):
        o, state = neural_memory(**options)
        values = flat({"o": o, "state": state})
        twice.append(gradients(values, flat(inputs), retain_graph=True))
        return o, state

    assert_gradients(measured(op).gradients, twice[0], 0.0)


def test_inputs_are_not_written_to_and_results_are_not_theirs(run):
    inputs, measured = run
    before = {name: x.detach().clone() for name, x in flat(inputs).items()}
    values = measured().values
    assert_values(flat(inputs), before, 0.0)
    assert not _storages(flat(inputs).values()).keys() & _storages(values.values()).keys()


def test_inputs_may_lie_in_memory_in_any_order(run):
    inputs, measured = run
    want = measured()

    def scattered(x):
        order = range(x.dim())[::-1]
        y = x.detach().permute(*order).contiguous().permute(*order)
        return torch.stack([y, y], -1)[..., 1].requires_grad_()

    other = {
        name: tuple(map(scattered, x)) if isinstance(x, tuple) else scattered(x)
        for name, x in inputs.items()
    }
    assert not other["q"].is_contiguous()
    _assert_equal(measured(inputs=other), want)


def test_gates_may_be_expanded(run):
    inputs, measured = run
    one = torch.tensor(0.01, requires_grad=True)
    expanded = inputs | dict.fromkeys(("theta", "alpha", "eta"), one.expand(2, 230, 2))
    written = inputs | dict.fromkeys(("theta", "alpha", "eta"), one * torch.ones(2, 230, 2))
    _assert_equal(measured(inputs=expanded), measured(inputs=written))


def test_gradients_may_come_in_any_order_in_memory(run):
    inputs, leaves = run[0], list(flat(run[0]).values())
    o, state = neural_memory(**inputs, output_final_state=True)
    for x in (o, state.weights[0], state.momentum[1]):
        dx = torch.randn_like(x)
        order = range(x.dim())[::-1]
        strided = dx.permute(*order).contiguous().permute(*order)
        ones = torch.ones(()).expand_as(x)
        for given, same in ((strided, dx), (ones, torch.ones_like(x))):
            got, want = (
                torch.autograd.grad(x, leaves, d, retain_graph=True, materialize_grads=True)
                for d in (given, same)
            )
            assert all(map(torch.equal, got, want))


def test_activation_checkpointing(run):
    _, measured = run

    def op(**options):
        return checkpoint(lambda: neural_memory(**options), use_reentrant=False)

    _assert_equal(measured(op), measured())


def test_reentrant_checkpointing_drops_what_only_the_state_carries(run):
    """Its autograd function sees tensors, not what is inside a state: use_reentrant=False does."""
    inputs, _ = run

    def piece_of(q):
        return neural_memory(**inputs | {"q": q}, output_final_state=True)

    o, state = checkpoint(piece_of, inputs["q"], use_reentrant=True)
    assert not any(x.requires_grad for x in flat({"state": state}).values())
    o.backward(*cotangents([o]))
    leaves = flat(inputs)
    want = gradients({"o": neural_memory(**inputs)[0]}, leaves)
    assert_gradients({name: x.grad for name, x in leaves.items()}, want)


def test_gradients_accumulate(run):
    """Over micro-batches, into the same leaves: those of the whole batch."""
    inputs, _ = run
    leaves = flat(inputs)
    whole, _ = neural_memory(**inputs)
    want = gradients({"o": whole}, leaves)
    (do,) = cotangents([whole])
    for row in range(2):
        part = {name: x[row : row + 1] if name in TOKENS else x for name, x in inputs.items()}
        neural_memory(**part)[0].backward(do[row : row + 1])
    assert_gradients({name: x.grad for name, x in leaves.items()}, want, 1e-5)


def test_autocast_changes_nothing(run):
    """q's dtype says what is computed in what; the layer around the operator is for autocast."""
    inputs, measured = run
    want = measured()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measured()
        read = retrieve(inputs["q"], inputs["weights"], norm=inputs["norm"])

    def forward_only(**options):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return neural_memory(**options)

    _assert_equal(inside, want)
    _assert_equal(measured(forward_only), want)
    assert torch.equal(read, retrieve(inputs["q"], inputs["weights"], norm=inputs["norm"]))


def test_inference_mode(run):
    inputs, _ = run
    first, second = (
        {n: x[:, part] if n in TOKENS else x for n, x in inputs.items()}
        for part in (slice(0, 100), slice(100, 230))
    )
    want, _ = neural_memory(**inputs)
    with torch.inference_mode():
        _, state = neural_memory(**first, output_final_state=True)
        inside, _ = neural_memory(**second, initial_state=state)
    trained, _ = neural_memory(**second, initial_state=state)  # a state to train on from
    assert not inside.requires_grad and trained.requires_grad
    assert isinstance(state, MemoryState) and torch.equal(inside, trained)
    assert_values({"o": inside}, {"o": want[:, 100:]}, 1e-5)
    assert gradients({"o": trained}, flat(second))["q"].isfinite().all()
    read = retrieve(inputs["q"], state, norm=inputs["norm"])
    assert gradients({"o": read}, flat(inputs))["norm[0]"].any()
