"""Checks of layers sharded over their heads, which `test_distributed` runs."""

import copy

import torch
import torch.distributed.checkpoint as dcp
from distributed_cases import (
    LAYERS,
    SOME,
    close,
    layer,
    mesh,
    raises,
    read,
    read_by_one,
    same_gradients,
    tokens,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from titans_kernels import NeuralMemory, no_weight_decay
from titans_kernels.distributed import ShardHeads


def check_outputs_and_gradients(rank, folder):
    ranks = mesh()
    for name in LAYERS:
        one = layer(name)
        many = parallelize_module(copy.deepcopy(one), ranks, ShardHeads())
        x, y = (tokens(2, 11, 8).requires_grad_() for _ in range(2))
        want, got = read_by_one(one, x, x.split([7, 4], 1)), read(many, y.split([7, 4], 1))
        close(got, want, "out", name)
        close(y.grad, x.grad, "gradient", name)
        same_gradients(many, one, name)


def check_packed_sequences_and_recall(rank, folder):
    ranks = mesh()
    ends = torch.tensor([0, 3, 3, 11])
    for name in ("memory", "mac", "mag", "tnt"):
        one = layer(name)
        many = parallelize_module(copy.deepcopy(one), ranks, ShardHeads())
        x = tokens(1, 11, 8)
        want, got = read_by_one(one, x, [x, x], ends), read(many, [x, x], ends)
        close(got, want, "out", name)
        same_gradients(many, one, name)
    one = layer("memory")
    many = parallelize_module(copy.deepcopy(one), ranks, ShardHeads())
    (want, _), (got, _) = (m.recall(x, m(x)[1]) for m in (one, many))
    close(got, want, "out", "recall")


def check_tokens_divided_outside_of_the_layer(rank, folder):
    count = torch.distributed.get_world_size()
    ranks = mesh()
    for name in ("memory", "mag"):
        one = layer(name)
        style = ShardHeads(sequence_parallel=True)
        many = parallelize_module(copy.deepcopy(one), ranks, style)
        x = tokens(2, 8, 8).requires_grad_()
        y = x.detach().chunk(count, 1)[rank].clone().requires_grad_()
        want, got = read_by_one(one, x, [x]), read(many, [y])
        close(got, want.chunk(count, 1)[rank], "out", name)
        close(y.grad, x.grad.chunk(count, 1)[rank], "gradient", name)
        same_gradients(many, one, name)


def check_parameters(rank, folder):
    ranks = mesh()
    one = layer("mag")
    many = parallelize_module(copy.deepcopy(one), ranks, ShardHeads())
    assert all(isinstance(p, DTensor) for p in many.parameters())
    assert no_weight_decay(many) == no_weight_decay(one)
    assert many.memory.weights[0].placements == (Shard(0),)
    assert many.memory.out_proj.weight.placements == (Shard(1),)
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        assert torch.equal(q.full_tensor(), p), name
    many(tokens(1, 3, 8))
    assert all(isinstance(p, DTensor) for p in many.parameters())  # not only before a call


def check_mistakes(rank, folder):
    ranks = mesh()
    raises(ValueError, "heads: got 3", lambda: ShardHeads()._apply(NeuralMemory(6, heads=3), ranks))
    raises(TypeError, "got Linear", lambda: ShardHeads()._apply(nn.Linear(2, 2), ranks))
    late = layer("memory")
    fully_shard(late, mesh=ranks)
    raises(ValueError, "before fully_shard", lambda: ShardHeads()._apply(late, ranks))
    many = parallelize_module(layer("memory"), ranks, ShardHeads())
    x, short = tokens(2, 5, 8), tokens(2, 4, 8)
    words = "length of x: got 4 on rank 1" if rank else "length of x: got 5 on rank 0"
    raises(ValueError, words, lambda: many(short if rank == 1 else x))
    many.chunk_size = 4 + rank
    raises(ValueError, "chunk_size: got ", lambda: many(x))
    raises(TypeError, "sequence_parallel: got 1", lambda: ShardHeads(sequence_parallel=1))


# ------------------------------------------------------------------------ with FSDP2 and DCP


def _sharded(many, ranks):
    parallelize_module(many, ranks["heads"], ShardHeads())
    return fully_shard(many, mesh=ranks["data"])


def check_with_fsdp2(rank, folder):
    ranks = mesh(2, 2, names=("data", "heads"))
    for name in SOME:
        one = layer(name)
        many = _sharded(copy.deepcopy(one), ranks)
        x = tokens(2, 11, 8)
        row = x[ranks["data"].get_local_rank()][None]
        want, got = read_by_one(one, x, x.split([7, 4], 1)), read(many, row.split([7, 4], 1))
        close(got, want[ranks["data"].get_local_rank()][None], "out", name)
        for p in one.parameters():
            p.grad /= 2  # FSDP2 takes the mean over its ranks
        same_gradients(many, one, name)


def check_checkpoints_go_from_mesh_to_mesh(rank, folder):
    one = layer("mag")
    square = mesh(2, 2, names=("data", "heads"))
    many = _sharded(copy.deepcopy(one), square)
    dcp.save(get_model_state_dict(many), checkpoint_id=f"{folder}/square")

    flat = mesh(names=("heads",))
    other = parallelize_module(layer("mag").apply(_zero), flat["heads"], ShardHeads())
    for copied in (other, layer("mag").apply(_zero)):
        found = get_model_state_dict(copied)
        dcp.load(found, checkpoint_id=f"{folder}/square")
        set_model_state_dict(copied, found)
        for (name, p), q in zip(one.named_parameters(), copied.parameters(), strict=True):
            assert torch.equal(whole(q), p), name


def _zero(module):
    for p in module.parameters(recurse=False):
        p.data.zero_()


TWO = [
    check_outputs_and_gradients,
    check_packed_sequences_and_recall,
    check_tokens_divided_outside_of_the_layer,
    check_parameters,
    check_mistakes,
]
FOUR = [
    check_outputs_and_gradients,
    check_with_fsdp2,
    check_checkpoints_go_from_mesh_to_mesh,
]
