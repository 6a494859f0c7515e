"""The check of kernels before their first use: wrong ones are found, right ones pass."""

import json
from itertools import pairwise
from unittest import mock

import pytest
import torch
import triton
from selfcheck_cases import H, configuration_of, fresh, plant, scaled

from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import Tile
from titans_kernels.packing import Options, Reading
from titans_kernels.selfcheck import check, records
from titans_kernels.selfcheck.configuration import Configuration

if not triton.knobs.runtime.interpret:
    pytest.skip("needs the interpreter", allow_module_level=True)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    yield from fresh(tmp_path, monkeypatch)


PASSES = ("coefficients", "scan", "retrieve")
BACKWARD = ("retrieve", "scan", "coefficients")
ALL = [(name, {}) for name in (*PASSES, *(f"{name}_backward" for name in BACKWARD))]
ALL += [("inputs_backward", {"keys": keys}) for keys in (False, True)]


@pytest.mark.parametrize("name, when", ALL, ids=str)
def test_a_pass_that_is_wrong_by_a_percent_is_found_out(monkeypatch, name, when):
    owner = operator.launch_backward if name.endswith("_backward") else operator.launch
    plant(monkeypatch, owner, name, scaled, **when)
    configuration = configuration_of(gradients=owner is operator.launch_backward)
    failure = check.check(configuration, H, torch.device("cpu"))
    assert failure is not None and failure.error > failure.bound


@pytest.fixture(scope="module")
def results():
    """What right kernels and the judge compute, in bfloat16."""
    from triton_support.interpreter import install

    install()
    configuration = configuration_of(torch.bfloat16)._replace(tokens=32)
    tile = mock.patch.object(operator, "tile", lambda *_: Tile(16, 16))
    with tile, mock.patch.object(check, "GATES", 1):
        x = check._memory_problem(configuration, 2, torch.device("cpu"))
        found = check._memory(check._backend("kernels"), configuration, x)
    exact = check._cast(x, torch.float64)
    return found, check._memory(check._backend("chunked"), configuration, exact), configuration


def test_the_bounds_let_right_kernels_pass(results):
    assert check.judge(*results) is None


def _with_noise(x):
    """A fifth of its norm, of which nothing lies along x: the factor stays 1."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    noise -= x * (x * noise).sum() / x.square().sum()
    x.add_(noise * (0.2 * x.norm() / noise.norm()))


@pytest.mark.parametrize("change", [scaled, torch.zero_, _with_noise])
def test_no_tensor_may_be_wrong(results, change):
    found, wanted, configuration = results
    names = [(kind, name) for kind in wanted for name in wanted[kind]]
    assert len(names) == 16
    for kind, name in names:
        wrong = {part: dict(tensors) for part, tensors in found.items()}
        wrong[kind][name] = wrong[kind][name].double().clone()
        change(wrong[kind][name])
        failure = check.judge(wrong, wanted, configuration)
        assert failure is not None and name in failure.tensor


@pytest.mark.parametrize("read", ["token", "chunk"])
def test_the_check_reads_what_the_call_reads(read):
    configuration = configuration_of()._replace(read=read)
    assert check._options(configuration).read == read


def test_every_length_is_checked_in_the_blocks_it_runs_in():
    """One check for all lengths from two blocks of the largest tile on, one for decoding."""
    from titans_kernels.kernels import tiles

    shipped = [
        t for table in (tiles._HALF, tiles._FORWARD) for rows in table.values() for t in rows
    ]
    assert max(tile.block for *_, tile in [*shipped, *tiles._SINGLE]) <= 128
    from titans_kernels.selfcheck.configuration import _tokens

    assert [_tokens(n, 16) for n in (0, 1, 16, 17, 100, 129, 256, 2048, 10**6)] == (
        [16, 16, 16, 32, 128, 256, 256, 256, 256]
    )
    assert [_tokens(n, 200) for n in (1, 200, 10**6)] == [200, 200, 512]
    assert [_tokens(n, 5) for n in (1, 15, 16, 17)] == [15, 15, 16, 32]
    assert _tokens(10**6, 2**20) == 8192


@pytest.mark.parametrize("widths", [(16, 16), (16, 32, 16), (16, 32, 48, 16)], ids=str)
def test_the_problem_has_the_widths_of_the_memory(widths):
    """Of every layer: kernels are compiled for each."""
    weights = [torch.ones(1, 1, *size) for size in pairwise(widths)]
    reading = Reading(torch.ones(1, 1, 16), weights, None, torch.tensor([0, 1]))
    ours = Configuration.of_reading(reading, Options("relu", True), 1)
    problem = check._reading_problem(ours, 1, torch.device("cpu"))
    assert [x.shape[2:] for x in problem.weights] == [x.shape[2:] for x in weights]
    assert records._record(ours) == json.loads(json.dumps(records._record(ours)))
