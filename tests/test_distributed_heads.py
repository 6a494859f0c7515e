"""Layers sharded over their heads do what whole ones do."""

import copy
import doctest
import re

import process_group
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from titans_kernels import NeuralMemory, no_weight_decay
from titans_kernels.distributed import ShardHeads, heads
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL

SIZE = {"heads": 4, "dim_head": 3, "chunk_size": 4, "dtype": torch.float64}
LAYERS = {
    "memory": lambda: NeuralMemory(8, per_layer_gates=True, **SIZE),
    "deep": lambda: NeuralMemory(8, depth=3, norm=False, conv_size=None, **SIZE),
    "lmm": lambda: TitansLMM(8, n_persistent=2, **SIZE),
    "mac": lambda: TitansMAC(8, segment=5, rotary=False, **SIZE),
    "mag": lambda: TitansMAG(8, window=5, rotary=False, **SIZE),
    "mal": lambda: TitansMAL(8, window=5, rotary=False, **SIZE),
}
RATES = {"out": 1e-11, "gradient": 1e-10}


def _layer(name):
    torch.manual_seed(0)
    return LAYERS[name]()


def _tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _close(got, want, what, name):
    bound = RATES[what] * max(1.0, want.abs().max().item())
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert got.shape == want.shape and error <= bound, f"{name}: {what} off by {error}"


def _whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def _same_gradients(got, want, name):
    for (parameter, p), q in zip(want.named_parameters(), got.parameters(), strict=True):
        _close(_whole(q.grad), p.grad, "gradient", f"{name}.{parameter}")


def _read(layer, pieces, cu_seqlens=None):
    """Pieces one after the other, with the state; and the gradients of the sum of squares."""
    state, outs = None, []
    for x in pieces:
        out, state = layer(x, state, cu_seqlens)
        outs.append(out)
    out = torch.cat(outs, 1)
    out.square().sum().backward()
    return out


def check_outputs_and_gradients(rank, folder):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name in LAYERS:
        one = _layer(name)
        many = parallelize_module(copy.deepcopy(one), mesh, ShardHeads())
        x, y = (_tokens(2, 11, 8).requires_grad_() for _ in range(2))
        want, got = (_read(m, z.split([7, 4], 1)) for m, z in ((one, x), (many, y)))
        _close(got, want, "out", name)
        _close(y.grad, x.grad, "gradient", name)
        _same_gradients(many, one, name)


def check_packed_sequences_and_recall(rank, folder):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    ends = torch.tensor([0, 3, 3, 11])
    for name in ("memory", "mac", "mag"):
        one = _layer(name)
        many = parallelize_module(copy.deepcopy(one), mesh, ShardHeads())
        x = _tokens(1, 11, 8)
        want, got = (_read(m, [x, x], ends) for m in (one, many))
        _close(got, want, "out", name)
        _same_gradients(many, one, name)
    one = _layer("memory")
    many = parallelize_module(copy.deepcopy(one), mesh, ShardHeads())
    (want, _), (got, _) = (m.recall(x, m(x)[1]) for m in (one, many))
    _close(got, want, "out", "recall")


def check_tokens_divided_outside_of_the_layer(rank, folder):
    count = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    for name in ("memory", "mag"):
        one = _layer(name)
        style = ShardHeads(sequence_parallel=True)
        many = parallelize_module(copy.deepcopy(one), mesh, style)
        x = _tokens(2, 8, 8).requires_grad_()
        y = x.detach().chunk(count, 1)[rank].clone().requires_grad_()
        want, got = _read(one, [x]), _read(many, [y])
        _close(got, want.chunk(count, 1)[rank], "out", name)
        _close(y.grad, x.grad.chunk(count, 1)[rank], "gradient", name)
        _same_gradients(many, one, name)


def check_parameters(rank, folder):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    one = _layer("mag")
    many = parallelize_module(copy.deepcopy(one), mesh, ShardHeads())
    assert all(isinstance(p, DTensor) for p in many.parameters())
    assert no_weight_decay(many) == no_weight_decay(one)
    assert many.memory.weights[0].placements == (Shard(0),)
    assert many.memory.out_proj.weight.placements == (Shard(1),)
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(q.full_tensor(), p), name
    many(_tokens(1, 3, 8))
    assert all(isinstance(p, DTensor) for p in many.parameters())  # not only before a call


def check_mistakes(rank, folder):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    _raises(ValueError, "heads: got 3", lambda: ShardHeads()._apply(NeuralMemory(6, heads=3), mesh))
    _raises(TypeError, "got Linear", lambda: ShardHeads()._apply(nn.Linear(2, 2), mesh))
    late = _layer("memory")
    fully_shard(late, mesh=mesh)
    _raises(ValueError, "before fully_shard", lambda: ShardHeads()._apply(late, mesh))
    _raises(TypeError, "sequence_parallel: got 1", lambda: ShardHeads(sequence_parallel=1))


def _raises(error, words, call):
    with pytest.raises(error, match=re.escape(words)):
        call()


# ------------------------------------------------------------------------ with FSDP2 and DCP


def _sharded(layer, mesh):
    parallelize_module(layer, mesh["heads"], ShardHeads())
    return fully_shard(layer, mesh=mesh["data"])


def check_with_fsdp2(rank, folder):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    for name in LAYERS:
        one = _layer(name)
        many = _sharded(copy.deepcopy(one), mesh)
        x = _tokens(2, 11, 8)
        row = x[mesh["data"].get_local_rank()][None]
        want, got = _read(one, x.split([7, 4], 1)), _read(many, row.split([7, 4], 1))
        _close(got, want[mesh["data"].get_local_rank()][None], "out", name)
        for p in one.parameters():
            p.grad /= 2  # FSDP2 takes the mean over its ranks
        _same_gradients(many, one, name)


def check_checkpoints_go_from_mesh_to_mesh(rank, folder):
    one = _layer("mag")
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    many = _sharded(copy.deepcopy(one), square)
    dcp.save(get_model_state_dict(many), checkpoint_id=f"{folder}/square")

    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("heads",))
    other = parallelize_module(_layer("mag").apply(_zero), flat["heads"], ShardHeads())
    whole = _layer("mag").apply(_zero)
    for layer in (other, whole):
        found = get_model_state_dict(layer)
        dcp.load(found, checkpoint_id=f"{folder}/square")
        set_model_state_dict(layer, found)
        for (name, p), q in zip(one.named_parameters(), layer.parameters(), strict=True):
            assert torch.equal(_whole(q), p), name


def _zero(module):
    for p in module.parameters(recurse=False):
        p.data.zero_()


# --------------------------------------------------------------------------------- the tests

TWO = [
    check_outputs_and_gradients,
    check_packed_sequences_and_recall,
    check_tokens_divided_outside_of_the_layer,
    check_parameters,
    check_mistakes,
]
FOUR = [check_with_fsdp2, check_checkpoints_go_from_mesh_to_mesh]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return process_group.run(TWO, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return process_group.run(FOUR, 4, tmp_path_factory.mktemp("four"))


@pytest.mark.slow
@pytest.mark.parametrize("check", TWO, ids=lambda check: check.__name__)
def test_two_processes(two, check):
    assert two[check.__name__] is None, two[check.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("check", FOUR, ids=lambda check: check.__name__)
def test_four_processes(four, check):
    assert four[check.__name__] is None, four[check.__name__]


def test_the_example():
    found = doctest.testmod(heads)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.wide
def test_every_head_a_process_of_its_own(tmp_path):
    checks = TWO[:3]
    assert process_group.run(checks, 4, tmp_path) == {check.__name__: None for check in checks}
