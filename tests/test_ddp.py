"""Data parallel training of the layer: two processes do what one does."""

import os
from pathlib import Path

import pytest
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
    return NeuralMemory(8, heads=2, chunk_size=4, dtype=torch.float64)


def _batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, 4, 11, 8, dtype=torch.float64, generator=generator)


def _worker(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        model = DistributedDataParallel(_layer())
        found = _train(model, _batches()[:, 2 * rank : 2 * rank + 2])
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    want = _train(_layer(), _batches())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, p in want.items():
            torch.testing.assert_close(found[name], p, rtol=1e-10, atol=1e-12, msg=name)
