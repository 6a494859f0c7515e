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


def check_bytes_along_the_length(rank, folder):
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    send, sent = dist.isend, []

    def counted(message, **named):
        sent.append(message.numel() * message.element_size())
        return send(message, **named)

    for name in LAYERS:
        for dtype, pieces in ((torch.float64, 1), (torch.bfloat16, 4)):
            one = layer(name).to(dtype)
            many = parallelize_module(one, mesh, ShardLength(pieces=pieces))
            with mock.patch.object(dist, "isend", counted):
                out, _ = many(tokens(2, 7 + rank, 8).to(dtype))
                forward = sum(sent)
                out.square().sum().backward()
            want = traffic.of_length(many, 2, dtype, pieces)
            assert forward == (0 if rank == count - 1 else want.forward), name
            assert sum(sent) - forward == (0 if rank == 0 else want.backward), name
            sent.clear()


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


TWO = [check_bytes_along_the_length, check_bytes_of_heads]
WIDE_FOUR = [check_bytes_along_the_length]
