"""The same bits again: over threads that call at once, threads inside torch, and its own switch."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton
from inputs import make_inputs
from torch.utils import _pytree as pytree

from titans_kernels import neural_memory
from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import Tile, tile, using

ROOT = Path(__file__).parents[1]


def _digest(tensors):
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in tensors)).hexdigest()


def _results(backend, seed, T=40):
    inputs = make_inputs(2, T, 2, 16, 32, 2, dtype=torch.float32, seed=seed)
    with using(Tile(16, 16)):  # of this thread
        o, state = neural_memory(**inputs, output_final_state=True, backend=backend)
    loss = o.square().sum() + sum(x.square().sum() for x in state.momentum)
    grads = torch.autograd.grad(loss, pytree.tree_leaves(inputs))
    return _digest([o, *pytree.tree_leaves(state), *grads])


@pytest.mark.parametrize("backend, calls", [("torch", 16), ("triton", 2)])
def test_calls_from_several_threads_are_each_their_own(backend, calls):
    T = 40 if backend == "torch" else 4
    want = [_results(backend, seed, T) for seed in range(calls)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: _results(backend, seed, T), range(calls)))
    assert got == want


@pytest.mark.skipif(
    torch.cuda.is_available() and not triton.knobs.runtime.interpret, reason="tensors of the CPU"
)
def test_a_backward_pass_in_another_thread_takes_the_tile_of_its_forward_pass(monkeypatch):
    """As autograd's own threads do, which run what is on a GPU."""
    taken = []
    monkeypatch.setattr(operator, "tile", lambda *args: taken.append(tile(*args)) or taken[-1])
    inputs, choice = make_inputs(1, 4, 1, 16, 16, 2, dtype=torch.float32), Tile(16, 16)
    with using(choice):
        o, _ = neural_memory(**inputs, backend="triton")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(o.sum().backward).result()
    assert len(taken) >= 2 and set(taken) == {choice}


def test_deterministic_algorithms_are_taken_and_no_memory_is_read_unwritten():
    """torch then fills what is allocated with NaN."""
    want = _results("torch", 0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        assert _results("torch", 0) == want
    finally:
        torch.use_deterministic_algorithms(before)


CODE = """
import sys, torch
from titans_kernels.layers import TitansMAC
torch.manual_seed(0)
block = TitansMAC(32, heads=2, segment=16, n_persistent=2)
x = torch.randn(3, 70, 32)
runs = []
for _ in range(3):
    out, _ = block(x)
    runs.append([out.detach(), *torch.autograd.grad(out.square().sum(), list(block.parameters()))])
torch.save((torch.get_num_threads(), runs), sys.argv[1])
"""


@pytest.mark.wide
def test_gradients_of_a_block_over_threads_of_torch(tmp_path):
    """The same bits for one number of threads; another splits sums another way."""
    found = {}
    for threads in (1, 2):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment |= {f"{kind}_NUM_THREADS": str(threads) for kind in ("OMP", "MKL")}
        command = [sys.executable, "-c", CODE, str(tmp_path / "runs.pt")]
        subprocess.run(command, env=environment, check=True)
        used, runs = torch.load(tmp_path / "runs.pt")
        assert used == threads
        for again in runs[1:]:
            assert all(map(torch.equal, again, runs[0]))
        found[threads] = runs[0]
    for x, y in zip(found[1], found[2], strict=True):
        assert (x - y).norm() <= 1e-5 * x.norm()
