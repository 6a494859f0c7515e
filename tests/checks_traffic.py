"""Checks that what is sent is what is computed on paper."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
from distributed_cases import LAYERS, SIZE, layer, mesh, tokens
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from titans_kernels.distributed import ShardHeads, ShardLength, traffic
from titans_kernels.layers.state import concatenate


def _sent(rank, many, *call):
    """Bytes that a rank sends forward and backward in a call."""
    send, sent = dist.isend, []

    def counted(message, **named):
        sent.append(message.numel() * message.element_size())
        return send(message, **named)

    with mock.patch.object(dist, "isend", counted):
        out, _ = many(*call)
        forward = sum(sent)
        out.square().sum().backward()
    return traffic.Bytes(forward, sum(sent) - forward)


def _ends(rank, want):
    """The last rank has nobody behind it, the first nobody before it."""
    last = rank == dist.get_world_size() - 1
    return traffic.Bytes(0 if last else want.forward, 0 if rank == 0 else want.backward)


def check_bytes_along_the_length(rank, folder):
    ranks = mesh()
    for name in LAYERS:
        for dtype, pieces in ((torch.float64, 1), (torch.bfloat16, 4)):
            one = layer(name).to(dtype)
            many = parallelize_module(one, ranks, ShardLength(pieces=pieces))
            want = traffic.of_length(many, 2, dtype, pieces)
            assert _sent(rank, many, tokens(2, 7 + rank, 8).to(dtype)) == _ends(rank, want), name


def check_bytes_that_need_not_go(rank, folder):
    """Of sequences that no border cuts, and of local memories that are reset at one."""
    count = dist.get_world_size()
    ranks, dtype, x = mesh(), torch.float64, tokens(1, 6, 8)
    for name in LAYERS:
        many = parallelize_module(layer(name), ranks, ShardLength(pieces=2, state="none"))
        one = traffic.of_length(many, 1, dtype, 2, packed=True)
        cut = torch.tensor([0, 2, 3, 6 * count])
        assert _sent(rank, many, x, None, cut) == _ends(rank, one), name
        between = torch.arange(0, 6 * count + 1, 2)
        facts = traffic.Bytes(traffic.HEADER, 0)
        assert _sent(rank, many, x, None, between) == _ends(rank, facts), name
    block = layer("tnt")
    block.persistent, block.n_persistent = None, 0
    states = [block(x[:, :read])[1].detach() for read in (6, 4, 0)]
    many = parallelize_module(block, ranks, ShardLength(pieces=2))
    at_reset, elsewhere = (
        [traffic.of_length(many, rows, dtype, 2, at_reset=reset) for rows in (1, 2)]
        for reset in (True, False)
    )
    assert at_reset[0] < elsewhere[0]
    unlike = concatenate([states[0], states[1]])
    two, none = x.expand(2, -1, -1), x[:, :0]
    calls = [(x, None, at_reset[0]), (x, states[0], at_reset[0]), (x, states[1], elsewhere[0])]
    calls += [(two, concatenate([states[0]] * 2), at_reset[1]), (two, unlike, elsewhere[1])]
    # A state that no token has come to is not that after a reset.
    calls += [(none, states[2], elsewhere[0]), (none, states[0], at_reset[0])]
    for y, state, want in calls:
        got = _sent(rank, many, y, state if rank == 0 else None)
        assert got == _ends(rank, want)


class _Summed(TorchDispatchMode):
    """Bytes of the tensors that are summed over ranks."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_reduce" in str(function):
            self.total += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


def check_bytes_of_heads(rank, folder):
    ranks = mesh()
    assert SIZE["heads"] % dist.get_world_size() == 0
    for name in ("memory", "mag", "mal"):
        one = copy.deepcopy(layer(name))
        if name != "memory":
            one.persistent = None
        many = parallelize_module(one, ranks, ShardHeads())
        want = traffic.of_heads(many, 2, 7, torch.float64)
        with _Summed() as forward:
            out, _ = many(tokens(2, 7, 8).requires_grad_())
        with _Summed() as backward:
            out.square().sum().backward()
        assert (forward.total, backward.total) == tuple(want), name


TWO = [check_bytes_along_the_length, check_bytes_that_need_not_go, check_bytes_of_heads]
FOUR = [check_bytes_along_the_length]
WIDE_FOUR = [check_bytes_that_need_not_go]
