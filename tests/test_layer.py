"""The layer against a plain composition that shares no code with it: exact, cut, packed, stable."""

import copy
import importlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from layer_cases import all_close, close, ends_of, gradients, randn, same_gradients, small_layer
from torch.utils._pytree import tree_leaves

import reference
from titans_kernels import NeuralMemory
from titans_kernels import neural_memory as operator

# The module: titans_kernels.layers.neural_memory the name could be mistaken for the operator.
module = importlib.import_module("titans_kernels.layers.neural_memory")

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
    layer = small_layer(**options)
    x = randn(1, sum(lengths), layer.dim).requires_grad_()
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    out, _ = layer(x, cu_seqlens=ends if len(lengths) > 1 else None)
    expected = torch.cat([_plain(layer, part) for part in x[0].split(lengths)])[None]

    close("out", out, expected, 1e-11)
    same_gradients(gradients(layer, [out], x), gradients(layer, [expected], x), 1e-10)


def _low_precision(dtype, autocast):
    layer = small_layer(dim=32, dim_head=8, heads=4, dtype=torch.float32)
    x = randn(1, 96, 32).float()
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
    grads = [gradients(layer, [y]) for y in outputs]
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
    layer = small_layer(per_layer_gates=cut == 5)
    x = randn(2, 40, layer.dim).requires_grad_()
    whole, final = layer(x)
    first, state = layer(x[:, :cut])
    second, state = layer(x[:, cut:], state)

    actual = [torch.cat([first, second], 1), *tree_leaves(state)]
    expected = [whole, *tree_leaves(final)]
    all_close("out, state", actual, expected, 1e-11)
    same_gradients(gradients(layer, actual, x), gradients(layer, expected, x), 1e-11)


def test_token_by_token_is_forward():
    layer = small_layer()
    x = randn(2, 40, layer.dim).requires_grad_()
    expected, final = layer(x)
    state, outputs = None, []
    for x_t in x.unbind(1):
        out, state = layer.step(x_t, state)
        outputs.append(out)

    actual = [torch.stack(outputs, 1), *tree_leaves(state)]
    expected = [expected, *tree_leaves(final)]
    all_close("out, state", actual, expected, 1e-11)
    same_gradients(gradients(layer, actual, x), gradients(layer, expected, x), 1e-11)


LENGTHS = [5, 0, 17, 1, 32, 2, 3, 0]


def test_packed_sequences_are_separate_runs_and_decode_on():
    layer = small_layer()
    rows = [randn(1, n, layer.dim, seed=n) for n in LENGTHS]
    packed, state = layer(torch.cat(rows, 1), cu_seqlens=torch.tensor([0, *ends_of(LENGTHS)]))
    runs = [layer(row) for row in rows]
    close("out", packed, torch.cat([out for out, _ in runs], 1), 1e-11)

    # Every row at its own phase of its chunk; then a batch; then packed again, other lengths.
    for t in range(20):
        x_t = randn(len(rows), layer.dim, seed=100 + t)
        out, state = layer.step(x_t, state)
        runs = [layer.step(row[None], run[1]) for row, run in zip(x_t, runs, strict=True)]
        close(f"step {t}", out, torch.cat([out for out, _ in runs]), 1e-11)

    lengths = LENGTHS[::-1]
    rows = [randn(1, n, layer.dim, seed=200 + n) for n in lengths]
    ends = torch.tensor([0, *ends_of(lengths)], dtype=torch.int32)
    packed, state = layer(torch.cat(rows, 1), state, cu_seqlens=ends)
    runs = [layer(row, run[1]) for row, run in zip(rows, runs, strict=True)]
    close("out", packed, torch.cat([out for out, _ in runs], 1), 1e-11)
    states = [tree_leaves(state) for _, state in runs]
    together = [torch.cat(parts) for parts in zip(*states, strict=True)]
    all_close("state", tree_leaves(state), together, 1e-11)


def test_packed_sequences_do_not_see_each_other():
    layer, ends = small_layer(), torch.tensor([0, 4, 4, 6, 20])
    x = randn(1, 20, layer.dim)
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
    layer = small_layer()
    _, state = layer(randn(3, 5, layer.dim))
    out, same = layer(randn(3, 0, layer.dim), state)
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
    x = randn(1, 4096, dim).to(dtype)
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
        perturbed, _ = layer(x + 1e-6 * randn(*x.shape, seed=2).to(dtype))
        growth = _windows(perturbed - out) / _windows(out) / 1e-6
    assert growth.max() < 10, f"a perturbation grew {growth.tolist()} times"


def test_packed_queries_without_a_state_are_sequences_of_their_own():
    layer, lengths = small_layer(), [5, 0, 1, 6]
    x, ends = randn(1, sum(lengths), 10), [0, *ends_of(lengths)]
    got, state = layer.recall(x, cu_seqlens=torch.tensor(ends))
    want = [layer.recall(x[:, a:b]) for a, b in itertools.pairwise(ends)]
    close("out", got, torch.cat([out for out, _ in want], 1), 1e-12)
    assert state.memory.k.shape[0] == len(lengths)
    for i, history in enumerate(state.convolution):
        close("history", history, torch.cat([s.convolution[i] for _, s in want]), 1e-12)
