"""Checks of the table that `torchrun -m titans_kernels.verify` prints."""

import contextlib
import io
from unittest import mock

import process_group
import torch

from titans_kernels.distributed import messages, verify


def _table():
    """One layer in float64 and float32: the exit code, and what the first rank prints."""
    layers = verify.layers
    only = mock.patch.object(
        verify, "layers", lambda heads: {"NeuralMemory": layers(heads)["NeuralMemory"]}
    )
    dtypes = mock.patch.object(verify, "DTYPES", (torch.float64, torch.float32))
    text = io.StringIO()
    with only, dtypes, contextlib.redirect_stdout(text):
        return verify._table(process_group.DEVICE.type, ("torch",)), text.getvalue()


def check_verify(rank, folder):
    code, text = _table()
    assert code == 0
    if rank == 0:
        assert text.count(" ok\n") == 5 and "4 comparisons with one process: all ok" in text
    else:
        assert not text


def check_verify_notices_gradients_that_are_lost_on_the_way(rank, folder):
    put = messages.Line.put

    def halved(line, tensors, to):
        back = to < line.rank
        put(line, [x / 2 if back else x for x in tensors], to)

    with mock.patch.object(messages.Line, "put", halved):
        code, text = _table()
    assert code == 1
    if rank == 0:
        lines = [line for line in text.splitlines() if "2 length" in line]
        assert len(lines) == 2 and all(line.endswith("FAIL") for line in lines)
        assert text.rstrip().endswith("4 comparisons with one process: 2 FAIL")


TWO = [check_verify, check_verify_notices_gradients_that_are_lost_on_the_way]
