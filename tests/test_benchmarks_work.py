"""What benchmarks time is the work that they name, and what they print is counted right."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from benchmarks.running import harness, memory, providers
from benchmarks.running.cases import CASES, OURS, TINY
from benchmarks.running.harness import QUICK, measure
from benchmarks.running.machine import describe
from benchmarks.running.shapes import FORWARD
from titans_kernels import neural_memory

BY_NAME = {case.name: case for case in CASES}
MACHINE = describe(1, 64)
MIB = 2**20


# ------------------------------------------------------------------------------ figures, by hand


def _measured(name, *seconds, runs=2):
    """Of blocks of `runs` calls, which took so long a call."""
    return Measurement(runs, [runs * x for x in seconds], TaskSpec(name, "pass"))


@pytest.mark.parametrize("per_token", [True, False])
def test_figures_of_given_times(per_token, monkeypatch):
    """Medians of all calls, for ours as for a peer; ratios of theirs to ours, round by round."""
    rounds = [
        {OURS: _measured(OURS, 1, 3, 4), "peer": _measured("peer", 6, 6, 7)},
        {OURS: _measured(OURS, 5, 5, 5), "peer": _measured("peer", 40, 20, 19)},
    ]
    peaks = {OURS: 2 * MIB, "peer": 6 * MIB}
    monkeypatch.setattr(harness, "take_turns", lambda *_: rounds)
    monkeypatch.setattr(harness, "peak_growth", lambda case, name, *_: peaks[name])
    build = providers.our_operator
    case = replace(BY_NAME["operator"], providers={OURS: build, "peer": build}, per_token=per_token)
    ours, peer = measure(case, replace(TINY, B=3), FORWARD, MACHINE, replace(QUICK, memory=True))
    tokens = 3 * (TINY.T if per_token else 1)
    assert (ours.p20_s, ours.median_s, ours.p80_s) == pytest.approx((3, 4.5, 5))
    assert (peer.p20_s, peer.median_s, peer.p80_s) == pytest.approx((6, 13, 20))
    assert [row.tokens_per_s for row in (ours, peer)] == pytest.approx([tokens / 4.5, tokens / 13])
    assert [row.time_ratio for row in (ours, peer)] == [1, (6 / 3 + 20 / 5) / 2]
    assert [row.calls for row in (ours, peer)] == [12, 12]
    assert [row.memory_ratio for row in (ours, peer)] == [1, 3]
    assert [row.peak_bytes for row in (ours, peer)] == list(peaks.values())


def test_a_peak_too_small_to_be_measured_has_no_ratio():
    assert harness.memory_ratio(3 * MIB, 2 * MIB) == 1.5
    assert harness.memory_ratio(3 * MIB, MIB - 1) is None
    assert harness.memory_ratio(MIB - 1, 3 * MIB) is None
    assert harness.memory_ratio(None, MIB) is harness.memory_ratio(MIB, None) is None


@pytest.mark.skipif(not memory.RESET.exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_is_of_the_call_alone():
    """Not of what was allocated and freed before it."""
    del [torch.ones(16 * MIB) for _ in range(2)][:]
    grown = memory.growth(lambda: [torch.ones(2 * MIB) for _ in range(8)])
    assert 60 * MIB < grown < 72 * MIB


def test_every_provider_is_called_in_every_round():
    """In turns, as often as it takes to fill the time; a slow one ends it after three rounds."""
    calls = []
    runners = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    effort = replace(QUICK, rounds=5, round_seconds=1e-4)
    rounds = harness.take_turns(runners, effort)
    assert [list(turn) for turn in rounds] == [["a", "b"]] * 5
    order = [name for name, after in zip(calls, [*calls[1:], None], strict=True) if name != after]
    assert order == ["a", "b"] * 5
    for name in runners:
        timed = sum(len(turn[name].raw_times) * turn[name].number_per_run for turn in rounds)
        assert calls.count(name) >= timed > 5
    assert len(harness.take_turns(runners, replace(effort, seconds=0.0))) == 3


# ------------------------------------------------------------------------------ the peers' work


def test_attention_is_causal_attention_of_the_same_tokens():
    inputs = BY_NAME["operator"].exact(TINY, TINY.T)
    task = providers.attention(inputs, TINY)
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    scores = q @ k.mT / math.sqrt(TINY.D)
    future = torch.ones(TINY.T, TINY.T, dtype=torch.bool).triu(1)
    want = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(task.call(), want)
    assert [id(x) for x in task.leaves] == [id(inputs[name]) for name in "qkv"]


class _Recorded(nn.Module):
    """In the place of titans_pytorch.NeuralMemory: what it is built with and called on."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.calls = options, []
        self.model = options["model"]

    def forward(self, x, state=None):
        self.calls.append((x, state))
        return x + 1, f"after {len(self.calls)}"


CHUNKS = {
    "layer": ("titans-pytorch", {"chunk_size": 16}),
    "layer-paper": ("titans-pytorch paper", {"chunk_size": 1, "batch_size": 16}),
    "decode": ("titans-pytorch", {"chunk_size": 16}),
}


@pytest.mark.parametrize("case", CHUNKS)
def test_titans_pytorch_gets_the_sizes_and_tokens_of_ours(case, monkeypatch):
    """Its paper form has gates and updates for every token, and equals ours: test_memory.py."""
    titans_pytorch = pytest.importorskip("titans_pytorch")
    built = []
    monkeypatch.setattr(
        titans_pytorch,
        "NeuralMemory",
        lambda **options: built.append(_Recorded(**options)) or built[0],
    )
    shape = replace(TINY, B=2)
    inputs, (name, chunks) = BY_NAME[case].made(shape, shape.T), CHUNKS[case]
    task = BY_NAME[case].providers[name](inputs, shape)
    out, [layer], x = task.call(), built, inputs["x"]
    model = layer.options.pop("model")
    assert layer.options == {"dim": 32, "heads": 2, "dim_head": 16} | chunks
    assert [tuple(p.shape) for p in model.parameters()] == [(16, 64), (64, 16)]
    if case == "decode":
        (first, none), (last, state) = layer.calls
        assert none is None and state == "after 1" and torch.equal(out, x[:, -1:] + 1)
        assert torch.equal(first, x[:, :-1]) and torch.equal(last, x[:, -1:]) and not task.leaves
    else:
        [(given, none)] = layer.calls
        assert given is x and none is None and torch.equal(out, x + 1)
        assert {id(leaf) for leaf in task.leaves} == {id(x), *map(id, layer.parameters())}


def test_ours_with_resets_is_ours_on_every_shard(monkeypatch):
    monkeypatch.setattr(providers, "RESET", 32)
    inputs = BY_NAME["operator"].exact(TINY, TINY.T)
    got = providers.our_shards(inputs, TINY).call()
    shared = {name: inputs[name] for name in ("weights", "norm")}
    for start in (0, 32):
        names = ("q", "k", "v", "theta", "alpha", "eta")
        shard = {name: inputs[name][:, start : start + 32] for name in names}
        want, _ = neural_memory(**shard, **shared, chunk_size=TINY.chunk)
        torch.testing.assert_close(got[:, start : start + 32], want, rtol=0, atol=1e-12)
