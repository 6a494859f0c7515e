"""Kernels are compiled for a model's sizes, never for a length: counted, not compiled."""

import json
import os
import subprocess
import sys

import pytest

LENGTHS = (1, 7, 16, 24, 33, 64, 100, 128, 200, 256, 500, 1024, 2000, 3000, 4096)
# Blocks of a call are no longer than its longest sequence: of 16, 32 and 64.
# Forward has one kernel for a single block, of each size, and coefficients, scan and retrieve for
# several; in training these, and eight kernels of the backward pass, which runs the same three
# again and keeps more of them.
KERNELS = {False: 3 + 3, True: 3 + 3 + 3 * 8}

COUNT = """
import json, sys
from unittest import mock

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.machine_code import offline
from titans_kernels.kernels import operator, tiles
from titans_kernels.packing import Options, pack

lengths, training, offset = json.loads(sys.argv[1])
seen, run = set(), JITFunction.run


def note(self, key, *_):
    seen.add((self.__name__, str(key)))


def without_a_gpu(self, *args, grid, warmup, **kwargs):
    return run(self, *args, grid=grid, warmup=True, **kwargs)


H, D, hidden, options = 2, 64, 256, Options("gelu_tanh", True)
with (
    mock.patch.object(driver, "_active", offline._StandIn("sm_90")),
    mock.patch.object(JITFunction, "_do_compile", note),
    mock.patch.object(JITFunction, "run", without_a_gpu),
    mock.patch.object(tiles, "architecture", lambda _: "sm_90"),
    mock.patch.object(operator, "architecture", lambda _: "sm_90"),
):
    for T in lengths:
        q = torch.empty(1, T, H, D, dtype=torch.bfloat16)
        gates = (torch.empty(1, T, H),) * 3
        weights = torch.empty(H, D, hidden), torch.empty(H, hidden, D)
        ends = torch.tensor([0, 0, T])[1:] if offset else None  # 8-byte aligned
        packed, longest = pack(q, q, q, gates, weights, None, None, ends)
        states = [*packed.weights, *packed.momentum]
        kept = [torch.empty(x) for x in operator.kept_shapes(packed, 16)] if training else []
        operator.forward(packed, options, 16, longest, kept)
        if training:
            operator.backward(packed, options, 16, longest, kept, packed.q, states)
print(json.dumps(sorted(name for name, _ in seen)))
"""


def _compiled(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-c", COUNT, json.dumps(arguments)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)


@pytest.mark.parametrize("training", [False, True])
def test_lengths_compile_no_kernel_of_their_own(training):
    names = _compiled(LENGTHS, training, False)
    assert len(names) == KERNELS[training], names


def test_offsets_of_a_batch_may_lie_anywhere():
    """Index tensors that 16 does not divide would be compiled anew."""
    assert _compiled((100,), True, True) == _compiled((100,), True, False)
