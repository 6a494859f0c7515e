"""The layer against a plain composition that shares no code with it, and as a part of models."""

import copy
import doctest
import importlib
import io
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import reference
from titans_kernels import NeuralMemory
from titans_kernels import neural_memory as operator
from titans_kernels.layers import LayerState
from titans_kernels.layers.convolution import ShortConvolution, convolve

# The module: titans_kernels.layers.neural_memory the name could be mistaken for the operator.
module = importlib.import_module("titans_kernels.layers.neural_memory")

SMALL = {"heads": 2, "dim_head": 4, "expansion": 2, "dtype": torch.float64}


def _layer(seed=0, dim=10, **options):
    torch.manual_seed(seed)
    layer = NeuralMemory(dim, **(SMALL | options))
    with torch.no_grad():  # off their initial values, so that each of them matters
        for name, p in layer.named_parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            elif "norm" in name:
                p.add_(0.1 * p.abs().max().clamp(0.1) * torch.randn_like(p))
        layer.alpha_bias.add_(2)
    return layer


def _randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _close(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    if actual.numel():
        error = (actual - expected).abs().max().item()
        bound = tolerance * expected.abs().max().item() + 1e-300
        assert error <= bound, f"{name}: error {error:.1e}, bound {bound:.1e}"


def _all_close(name, actual, expected, tolerance):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        _close(f"{name}[{i}]", x, y, tolerance)


def _cotangent(tensors):
    """A scalar that weighs every entry of the tensors differently."""
    return sum((x * _randn(*x.shape, seed=i)).sum() for i, x in enumerate(tensors))


def _gradients(layer, outputs, *others):
    """Gradients of the parameters and of other leaves, by name."""
    named = dict(layer.named_parameters()) | {f"input {i}": x for i, x in enumerate(others)}
    outputs = [x for x in outputs if x.is_floating_point()]
    # A memory that goes on from a state does not read M_0: no gradient, that is, zeros.
    found = torch.autograd.grad(_cotangent(outputs), named.values(), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def _same_gradients(actual, expected, tolerance):
    for name, value in actual.items():
        _close(f"d {name}", value, expected[name], tolerance)


# Against the definition.


def _plain(layer, x, *, rounded=lambda x: x):
    """The layer on one sequence [T, dim], in loops over its parameters, by the reference's memory.

    `rounded` rounds what a layer of low precision rounds: operands and results of projections, and
    what the memory is given and returns.
    """
    p = {name: value.double() for name, value in layer.named_parameters()}
    H, D, L = layer.heads, layer.dim_head, layer.depth
    x = rounded(x)

    def project(name, x):
        return rounded(x @ rounded(p[f"{name}_proj.weight"]).T)

    def convolve(i, y):
        taps = p[f"convolutions.{i}.weight"] if layer.conv_size else None
        out = []
        for t in range(len(y)):
            past = range(max(0, t - layer.conv_size + 1), t + 1)
            terms = [y[s] * taps[:, layer.conv_size - 1 - (t - s)] for s in past]
            out.append(sum(terms) if layer.conv_size else y[t])
        return torch.stack(out) if out else y

    def prepare(i, name):
        y = convolve(i, project(name, x))
        y = (y * torch.sigmoid(y)).view(-1, H, D)
        return rounded(y / (y.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt())[None]

    def gate(name):
        g = torch.sigmoid(project(name, x) + p[f"{name}_bias"])
        return g.view(1, -1, H, L) if layer.per_layer_gates else g[None]

    o, _ = reference.neural_memory(
        *(prepare(i, name) for i, name in enumerate("qkv")),
        layer.max_learning_rate * gate("theta"),
        gate("alpha"),
        gate("eta"),
        tuple(p[f"weights.{i}"] for i in range(L)),
        norm=(p["norm_weight"], p["norm_bias"]) if layer.norm else None,
        activation=layer.activation,
        residual=layer.residual,
        chunk_size=layer.chunk_size,
    )
    o = rounded(o[0])
    o = o / ((o.pow(2).sum(-1, keepdim=True) + 1e-6) / D).sqrt() * p["out_norm"]
    g = project("gate", x)
    return project("out", rounded(o.flatten(-2) * g * torch.sigmoid(g)))


CASES = {
    "as it comes": ({}, [37]),
    "heads of dim / heads, GELU": ({"dim": 12, "dim_head": None, "activation": "gelu"}, [21]),
    "depth 1, no residual": ({"depth": 1, "residual": False}, [20]),
    "depth 3, gates per layer": ({"depth": 3, "per_layer_gates": True, "chunk_size": 4}, [18]),
    "no norm": ({"norm": False, "max_learning_rate": 0.02}, [20]),
    "no convolution": ({"conv_size": None}, [20]),
    "a convolution of one": ({"conv_size": 1}, [9]),
    "a convolution longer than the sequence": ({"conv_size": 7}, [5]),
    "chunk 1, SiLU": ({"chunk_size": 1, "activation": "silu"}, [12]),
    "packed, some shorter than the filter": ({"chunk_size": 4}, [5, 0, 1, 2, 13, 0, 3, 0]),
    "packed, no convolution": ({"conv_size": 0, "chunk_size": 4}, [5, 0, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_plain_composition(case):
    options, lengths = CASES[case]
    layer = _layer(**options)
    x = _randn(1, sum(lengths), layer.dim).requires_grad_()
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    out, _ = layer(x, cu_seqlens=ends if len(lengths) > 1 else None)
    expected = torch.cat([_plain(layer, part) for part in x[0].split(lengths)])[None]

    _close("out", out, expected, 1e-11)
    _same_gradients(_gradients(layer, [out], x), _gradients(layer, [expected], x), 1e-10)


def _low_precision(dtype, autocast):
    layer = _layer(dim=32, dim_head=8, heads=4, dtype=torch.float32)
    x = _randn(1, 96, 32).float()
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        out, state = layer(x)
    return layer, x, out, state


@pytest.mark.parametrize("autocast", [False, True], ids=["module", "autocast"])
def test_bfloat16_loses_what_its_roundings_lose(autocast):
    layer, x, out, state = _low_precision(torch.bfloat16, autocast)
    assert out.dtype == torch.bfloat16
    memory = state.memory
    assert memory.k.dtype == state.convolution[0].dtype == torch.bfloat16
    for part in (*memory.weights, *memory.momentum, memory.theta, memory.alpha, memory.eta):
        assert part.dtype == torch.float32

    exact = _plain(layer, x[0].double())[None]
    yardstick = _plain(layer, x[0].double(), rounded=lambda x: x.bfloat16().double())[None]
    outputs = [out.double(), yardstick, exact]
    grads = [_gradients(layer, [y]) for y in outputs]
    scale = grads[-1]
    # Each gradient by its size, and all together: four numbers of a bias alone are luck.
    found = {
        "out": outputs,
        "gradients": [
            torch.cat([(g[name].double() / scale[name].norm()).flatten() for name in scale])
            for g in grads
        ],
    }
    for name, (actual, yardstick, exact) in found.items():
        for measure, factor in ((torch.linalg.vector_norm, 1.25), (lambda x: x.abs().max(), 2.0)):
            error, bound = measure(actual - exact), factor * measure(yardstick - exact)
            assert error <= bound, f"{name}: error {error:.1e}, bound {bound:.1e}"


# Streams.


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 5, 15, 16, 17, 20, 31, 39, 40])
def test_a_cut_changes_nothing(cut):
    layer = _layer(per_layer_gates=cut == 5)
    x = _randn(2, 40, layer.dim).requires_grad_()
    whole, final = layer(x)
    first, state = layer(x[:, :cut])
    second, state = layer(x[:, cut:], state)

    actual = [torch.cat([first, second], 1), *tree_leaves(state)]
    expected = [whole, *tree_leaves(final)]
    _all_close("out, state", actual, expected, 1e-11)
    _same_gradients(_gradients(layer, actual, x), _gradients(layer, expected, x), 1e-11)


def test_token_by_token_is_forward():
    layer = _layer()
    x = _randn(2, 40, layer.dim).requires_grad_()
    expected, final = layer(x)
    state, outputs = None, []
    for x_t in x.unbind(1):
        out, state = layer.step(x_t, state)
        outputs.append(out)

    actual = [torch.stack(outputs, 1), *tree_leaves(state)]
    expected = [expected, *tree_leaves(final)]
    _all_close("out, state", actual, expected, 1e-11)
    _same_gradients(_gradients(layer, actual, x), _gradients(layer, expected, x), 1e-11)


LENGTHS = [5, 0, 17, 1, 32, 2, 3, 0]


def test_packed_sequences_are_separate_runs_and_decode_on():
    layer = _layer()
    rows = [_randn(1, n, layer.dim, seed=n) for n in LENGTHS]
    packed, state = layer(torch.cat(rows, 1), cu_seqlens=torch.tensor([0, *_ends(LENGTHS)]))
    runs = [layer(row) for row in rows]
    _close("out", packed, torch.cat([out for out, _ in runs], 1), 1e-11)

    # Every row at its own phase of its chunk; then a batch; then packed again, other lengths.
    for t in range(20):
        x_t = _randn(len(rows), layer.dim, seed=100 + t)
        out, state = layer.step(x_t, state)
        runs = [layer.step(row[None], run[1]) for row, run in zip(x_t, runs, strict=True)]
        _close(f"step {t}", out, torch.cat([out for out, _ in runs]), 1e-11)

    lengths = LENGTHS[::-1]
    rows = [_randn(1, n, layer.dim, seed=200 + n) for n in lengths]
    ends = torch.tensor([0, *_ends(lengths)], dtype=torch.int32)
    packed, state = layer(torch.cat(rows, 1), state, cu_seqlens=ends)
    runs = [layer(row, run[1]) for row, run in zip(rows, runs, strict=True)]
    _close("out", packed, torch.cat([out for out, _ in runs], 1), 1e-11)
    states = [tree_leaves(state) for _, state in runs]
    together = [torch.cat(parts) for parts in zip(*states, strict=True)]
    _all_close("state", tree_leaves(state), together, 1e-11)


def _ends(lengths):
    return itertools.accumulate(lengths)


def test_packed_sequences_do_not_see_each_other():
    layer, ends = _layer(), torch.tensor([0, 4, 4, 6, 20])
    x = _randn(1, 20, layer.dim)
    out, state = layer(x, cu_seqlens=ends)
    other = x.clone()
    other[:, 4:6] = 100.0
    changed, changed_state = layer(other, cu_seqlens=ends)
    assert torch.equal(out[:, :4], changed[:, :4]) and torch.equal(out[:, 6:], changed[:, 6:])
    assert not torch.equal(out[:, 4:6], changed[:, 4:6])
    keep = torch.tensor([0, 1, 3])
    before, after = (tree_leaves(s.index_select(keep)) for s in (state, changed_state))
    assert all(map(torch.equal, before, after))


def test_nothing_is_a_sequence_too():
    layer = _layer()
    _, state = layer(_randn(3, 5, layer.dim))
    out, same = layer(_randn(3, 0, layer.dim), state)
    assert out.shape == (3, 0, layer.dim)
    assert all(map(torch.equal, tree_leaves(state), tree_leaves(same)))


STREAM = """
import resource, sys
import torch
from torch.utils._pytree import tree_leaves
from titans_kernels import NeuralMemory

torch.manual_seed(0)
layer, state, peaks, sizes = NeuralMemory(32, heads=1), None, [], []
with torch.no_grad():
    for _ in range(50):
        out, state = layer(torch.randn(1, 4_000, 32), state)
        assert out.isfinite().all()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks.append(peak if sys.platform == "darwin" else peak * 1024)
        storages = {x.untyped_storage() for x in tree_leaves(state)}
        sizes.append(sum(len(x) for x in {x.data_ptr(): x for x in storages}.values()))
print(peaks[-1] - peaks[4], sizes[0], max(sizes))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from `resource`")
def test_200_000_tokens_in_constant_memory():
    # A process of its own: what ran before in this one would hide a peak.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STREAM]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    grown, first, largest = map(int, run.stdout.split())
    # All outputs together would be 25 MB; the state's weights and momentum are 64 KiB.
    assert grown < 2**22, f"peak memory grew by {grown / 2**20:.1f} MB"
    assert largest == first < 2**17


# Stability.


class _Spy:
    """Stands in for the operator and keeps what the layer gave it."""

    def __call__(self, q, k, v, **options):
        self.k, self.v, self.options = k, v, options
        return operator(q, k, v, **options)

    def losses(self):
        """||f(k) - v||^2 of every token at the weights before it: the query t is the key t + 1."""
        options = self.options | {"output_final_state": False}
        found, _ = operator(self.k.roll(-1, 1), self.k, self.v, **options)
        return (found - self.v.roll(-1, 1))[:, :-1].double().square().sum(-1).mean((0, 2))


def _windows(x):
    """Root mean square of [1, T, dim] over each of eight parts of the sequence."""
    return x.double().square().mean((0, 2)).unflatten(0, (8, -1)).mean(1).sqrt()


STABLE = {
    "float64": (torch.float64, {"heads": 2}, 128),
    "float32": (torch.float32, {"heads": 2}, 128),
    "bfloat16": (torch.bfloat16, {"heads": 2}, 128),
    "float32, dim 384": (torch.float32, {"heads": 6}, 384),
    "bfloat16, chunk 64": (torch.bfloat16, {"heads": 2, "chunk_size": 64}, 128),
    "float64, depth 4": (torch.float64, {"heads": 2, "dim_head": 32, "depth": 4}, 128),
}


@pytest.mark.parametrize("case", STABLE)
def test_4096_random_tokens_are_stable(case, monkeypatch):
    dtype, options, dim = STABLE[case]
    spy = _Spy()
    monkeypatch.setattr(module, "neural_memory", spy)
    torch.manual_seed(0)
    layer = NeuralMemory(dim, **options).to(dtype)
    x = _randn(1, 4096, dim).to(dtype)
    with torch.no_grad():
        out, state = layer(x)
        assert all(y.isfinite().all() for y in (out, *tree_leaves(state)))
        assert 0.3 < out.double().std() < 1.0

        losses = spy.losses()
        first, last = losses[:512].mean(), losses[-512:].mean()
        # Three unit vectors at first, key, LayerNorm and value: a loss of about 3.
        assert losses[:64].mean() < 4
        assert last < first, f"the inner loss grew from {first:.3f} to {last:.3f}"

        if dtype == torch.bfloat16:  # it cannot hold the perturbation: its own rounding is one
            exact, _ = copy.deepcopy(layer).double()(x.double())
            errors = _windows(out - exact) / _windows(exact)
            assert errors.max() < 3 * 2**-8 and errors[-1] < 1.5 * errors[0], errors.tolist()
            return
        perturbed, _ = layer(x + 1e-6 * _randn(*x.shape, seed=2).to(dtype))
        growth = _windows(perturbed - out) / _windows(out) / 1e-6
    assert growth.max() < 10, f"a perturbation grew {growth.tolist()} times"


# A module among others.


@pytest.mark.parametrize(
    "depth, conv_size, norm, per_layer_gates",
    [(1, 4, True, False), (2, 3, False, True), (4, 0, True, True)],
)
def test_parameter_count_is_the_formula(depth, conv_size, norm, per_layer_gates):
    dim, heads, dim_head, expansion = 24, 3, 5, 2
    layer = NeuralMemory(
        dim,
        heads=heads,
        dim_head=dim_head,
        depth=depth,
        expansion=expansion,
        conv_size=conv_size,
        norm=norm,
        per_layer_gates=per_layer_gates,
    )
    inner, hidden = heads * dim_head, expansion * dim_head
    gates = heads * (depth if per_layer_gates else 1)
    M = dim_head**2 if depth == 1 else 2 * dim_head * hidden + (depth - 2) * hidden**2
    expected = 5 * dim * inner + 3 * inner * conv_size + 3 * gates * (dim + 1) + heads * M
    expected += (3 if norm else 1) * inner
    assert sum(p.numel() for p in layer.parameters()) == expected


def test_state_dict_and_copies_hold_everything():
    layer, x = _layer(), _randn(1, 20, 10)
    out, _ = layer(x)
    other = _layer(seed=5)
    assert not torch.equal(other(x)[0], out)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x)[0], out)
    assert torch.equal(copy.deepcopy(layer)(x)[0], out)


def test_a_saved_state_goes_on():
    layer, x = _layer(), _randn(2, 30, 10)
    with torch.no_grad():
        _, state = layer(x[:, :19])
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert isinstance(loaded, LayerState)
        assert torch.equal(layer(x[:, 19:], loaded)[0], layer(x[:, 19:], state)[0])
        swapped = state.index_select(torch.tensor([1, 0]))
        assert torch.equal(layer(x[:, 19:].flip(0), swapped)[0].flip(0), layer(x[:, 19:], state)[0])
    _, state = layer(x)
    assert any(y.requires_grad for y in tree_leaves(state))
    assert not any(y.requires_grad for y in tree_leaves(state.detach()))


def test_meta_device_then_initialised_as_ever():
    options = {"heads": 2, "per_layer_gates": True}
    meta, layer = NeuralMemory(16, **options, device="meta"), NeuralMemory(16, **options)
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu")
    for module in (meta, layer):
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(float("nan"))
        torch.manual_seed(3)
        module.reset_parameters()
    plain = ("theta_bias", "alpha_bias", "eta_bias", "norm_weight", "norm_bias", "out_norm")
    for (name, p), expected in zip(meta.named_parameters(), layer.parameters(), strict=True):
        assert torch.equal(p, expected), name
        assert getattr(p, "_no_weight_decay", False) == (name in plain), name


def test_checkpointing_changes_nothing():
    layer, x = _layer(), _randn(1, 40, 10).requires_grad_()
    _, start = layer(_randn(1, 7, 10, seed=4))
    start = start.detach()
    out, state = layer(x, start)
    expected = _gradients(layer, [out, *tree_leaves(state)], x)
    out, state = checkpoint(layer, x, start, use_reentrant=False)
    actual = _gradients(layer, [out, *tree_leaves(state)], x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_docstring_example_runs():
    found = doctest.DocTestFinder().find(NeuralMemory, globs={})
    runner = doctest.DocTestRunner()
    for test in found:
        runner.run(test)
    assert runner.summarize().attempted > 0 and runner.failures == 0


def test_repr_names_the_sizes():
    text = repr(NeuralMemory(16, heads=2))
    assert "16, heads=2, dim_head=8, depth=2, expansion=4, chunk_size=16" in text
    assert "32, size=4" in repr(NeuralMemory(16, heads=2, dim_head=16))


@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
def test_a_filter_of_one_tap_has_no_history(lengths):
    x, cu_seqlens = _randn(1, 8, 6), None
    if lengths is not None:
        cu_seqlens = torch.tensor([0, *_ends(lengths)])
    convolution = ShortConvolution(6, 1, dtype=torch.float64)
    filters = [convolution()]
    y, (history,) = convolve(filters, [x], None, cu_seqlens)
    assert torch.equal(y[:, 0], x * convolution.weight[:, 0])
    assert history.shape == (len(lengths or [8]), 0, 6)
    again, (history,) = convolve(filters, [x], [history], cu_seqlens)
    assert torch.equal(again, y) and history.shape[1] == 0


def test_parameters_start_at_the_scale_that_is_documented():
    torch.manual_seed(0)
    layer = NeuralMemory(256, heads=2, dim_head=128)
    first, second = layer.weights
    scale = {
        **{"q_proj": 256**-0.5, "v_proj": 256**-0.5, "theta_proj": 0.1 * 256**-0.5},
        **{"alpha_proj": 0.1 * 256**-0.5, "out_proj": 256**-0.5, "gate_proj": 256**-0.5},
    }
    stds = {getattr(layer, name).weight: std for name, std in scale.items()}
    stds |= {first: 1.0, second: 512**-0.5}
    stds |= {NeuralMemory(256, heads=2, dim_head=128, norm=False).weights[0]: 128**-0.5}
    stds |= {NeuralMemory(256, heads=2, dim_head=128, depth=1).weights[0]: 128**-0.5}
    for weight, std in stds.items():
        deviation = 4 * (2 * weight.numel()) ** -0.5  # of a sample's standard deviation
        assert abs(weight.std() / std - 1) < deviation
        assert abs(weight.mean()) < 4 * std * weight.numel() ** -0.5
    for filter_ in layer.convolutions:
        assert abs(filter_.weight.std() / 4**-0.5 - 1) < 4 * (2 * filter_.weight.numel()) ** -0.5
    assert (layer.norm_weight == 128**-0.5).all() and (layer.alpha_bias == -8.0).all()


def test_packed_queries_without_a_state_are_sequences_of_their_own():
    layer, lengths = _layer(), [5, 0, 1, 6]
    x, ends = _randn(1, sum(lengths), 10), [0, *_ends(lengths)]
    got, state = layer.recall(x, cu_seqlens=torch.tensor(ends))
    want = [layer.recall(x[:, a:b]) for a, b in itertools.pairwise(ends)]
    _close("out", got, torch.cat([out for out, _ in want], 1), 1e-12)
    assert state.memory.k.shape[0] == len(lengths)
    for i, history in enumerate(state.convolution):
        _close("history", history, torch.cat([s.convolution[i] for _, s in want]), 1e-12)
