"""Long runs: errors, memory and time do not grow with what has been read. `make test-all`."""

import os
import subprocess
import sys

import pytest
import test_layer
import torch
from inputs import make_inputs
from yardstick import assert_values, flat

import reference
from titans_kernels import neural_memory

pytestmark = pytest.mark.wide


def _error(T):
    """Of bfloat16 at the end of T tokens, relative to float64 of the same rounded inputs."""
    sizes = {"H": 2, "D": 16, "hidden": 32, "depth": 2, "requires_grad": False}
    inputs = make_inputs(1, T, **sizes, dtype=torch.bfloat16)
    exact = {
        name: tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()
        for name, x in inputs.items()
    }
    o, want = neural_memory(**inputs)[0][:, -512:], neural_memory(**exact)[0][:, -512:]
    return ((o - want).norm() / want.norm()).item()


def test_bfloat16_errs_no_more_after_16_000_tokens():
    assert _error(16_384) <= 4 * _error(1_024)


def test_nothing_is_forgotten_over_16_000_tokens():
    """eta = 1, alpha = 0: every surprise is still in the momentum, and in every weight since."""
    inputs = make_inputs(1, 16_000, 1, 4, 6, 2, requires_grad=False)
    inputs["theta"] = inputs["theta"] * 1e-8
    inputs["alpha"], inputs["eta"] = inputs["alpha"] * 0, torch.ones_like(inputs["eta"])
    got = neural_memory(**inputs, output_final_state=True)
    want = reference.neural_memory(**inputs, output_final_state=True)
    names = ("o", "state")
    assert_values(flat(dict(zip(names, got))), flat(dict(zip(names, want))), 1e-10)  # noqa: B905
    assert (want[0][:, -1] - want[0][:, 0]).abs().max() > 1e-3


TRAINING = """
import gc, resource, torch
from titans_kernels import NeuralMemory

torch.manual_seed(0)
layer = NeuralMemory(16, heads=2)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
x, target, state, first = torch.randn(2, 1_000 * 16, 16), torch.randn(16, 16), None, None
for step in range(1_000):
    now = x[:, 16 * step : 16 * step + 16]
    out, state = layer(now, state and state.detach())
    loss = (out - now @ target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    if step == 200:
        gc.collect()
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        count = sum(map(torch.is_tensor, gc.get_objects()))
gc.collect()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first)
print(sum(map(torch.is_tensor, gc.get_objects())) - count)
"""


def _lines(code):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return map(int, run.stdout.split())


def test_1000_training_steps_leave_nothing_behind():
    grown, tensors = _lines(TRAINING)
    assert grown < 4096 and tensors <= 2  # KiB


def test_2_000_000_tokens_in_constant_memory():
    pieces = "range(50)"
    assert pieces in test_layer.STREAM
    grown, first, largest = _lines(test_layer.STREAM.replace(pieces, "range(500)"))
    assert grown < 2**22 and largest == first < 2**17
