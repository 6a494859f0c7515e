"""Checks of data parallel training of the layer, which `test_distributed` runs."""

import process_group
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from titans_kernels import NeuralMemory

STEPS = 3


def _train(model, batches):
    """Parameters after a few steps, the state going from one to the next."""
    optimizer, state = torch.optim.SGD(model.parameters(), 0.1), None
    for x in batches:
        out, state = model(x, state)
        state = state.detach()
        optimizer.zero_grad()
        out.square().mean().backward()
        optimizer.step()
    return {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}


def _layer():
    torch.manual_seed(0)
    layer = NeuralMemory(8, heads=2, chunk_size=4, dtype=torch.float64)
    return layer.to(process_group.DEVICE)


def check_processes_train_as_one(rank, folder):
    count, generator = dist.get_world_size(), torch.Generator().manual_seed(1)
    batches = torch.randn(STEPS, 2 * count, 11, 8, dtype=torch.float64, generator=generator)
    batches = batches.to(process_group.DEVICE)
    found = _train(DistributedDataParallel(_layer()), batches[:, 2 * rank : 2 * rank + 2])
    for name, p in _train(_layer(), batches).items():
        torch.testing.assert_close(found[name], p, rtol=1e-10, atol=1e-12, msg=name)


TWO = [check_processes_train_as_one]
