"""Checks that what is sent is what is computed on paper."""

import copy
from unittest import mock

import torch
import torch.distributed as dist
from distributed_cases import LAYERS, SIZE, layer, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from titans_kernels.distributed import ShardHeads, ShardLength, traffic


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
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in LAYERS:
        for dtype, pieces in ((torch.float64, 1), (torch.bfloat16, 4)):
            one = layer(name).to(dtype)
            many = parallelize_module(one, mesh, ShardLength(pieces=pieces))
            want = traffic.of_length(many, 2, dtype, pieces)
            assert _sent(rank, many, tokens(2, 7 + rank, 8).to(dtype)) == _ends(rank, want), name


def check_bytes_that_need_not_go(rank, folder):
    """Of sequences that no border cuts, and of local memories that are reset at one."""
    count = dist.get_world_size()
    mesh, dtype, x = init_device_mesh("cpu", (count,)), torch.float64, tokens(1, 6, 8)
    for name in LAYERS:
        many = parallelize_module(layer(name), mesh, ShardLength(pieces=2, state="none"))
        one = traffic.of_length(many, 1, dtype, 2, packed=True)
        cut = torch.tensor([0, 2, 3, 6 * count])
        assert _sent(rank, many, x, None, cut) == _ends(rank, one), name
        between = torch.arange(0, 6 * count + 1, 2)
        facts = traffic.Bytes(traffic.HEADER, 0)
        assert _sent(rank, many, x, None, between) == _ends(rank, facts), name
    block = layer("tnt")
    block.persistent, block.n_persistent = None, 0
    many = parallelize_module(block, mesh, ShardLength())
    want = traffic.of_length(many, 1, dtype, 4 * (count - 1), at_reset=True)
    assert want < traffic.of_length(many, 1, dtype, 4 * (count - 1))
    assert _sent(rank, many, x) == _ends(rank, want)


class _Summed(TorchDispatchMode):
    """Bytes of the tensors that are summed over ranks."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_reduce" in str(function):
            self.total += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


def check_bytes_of_heads(rank, folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert SIZE["heads"] % dist.get_world_size() == 0
    for name in ("memory", "mag", "mal"):
        one = copy.deepcopy(layer(name))
        if name != "memory":
            one.persistent = None
        many = parallelize_module(one, mesh, ShardHeads())
        want = traffic.of_heads(many, 2, 7, torch.float64)
        with _Summed() as forward:
            out, _ = many(tokens(2, 7, 8).requires_grad_())
        with _Summed() as backward:
            out.square().sum().backward()
        assert (forward.total, backward.total) == tuple(want), name


TWO = [check_bytes_along_the_length, check_bytes_that_need_not_go, check_bytes_of_heads]
WIDE_FOUR = [check_bytes_along_the_length, check_bytes_that_need_not_go]
