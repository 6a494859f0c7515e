"""The demo's parts against what they should be by hand: text, baselines, rates, streams."""

import gzip
import math

import pytest
import torch

from titans_kernels.demo.model import Block, ByteModel, is_unwritten, without_writing
from titans_kernels.demo.reading import read, state_bytes, stream
from titans_kernels.demo.text import bigram_bits, gzip_bits
from titans_kernels.demo.training import Schedule
from titans_kernels.train.measures import bits, by_doubling
from titans_kernels.train.text import excerpts, windows


def _model():
    torch.manual_seed(0)
    model = ByteModel(16, 2, 2, 8)
    for parameter in model.parameters():  # blocks start as the identity
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def _text(rows, length):
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(1))


def test_windows_are_anywhere():
    """Every place of every file, and none beyond its end: 12 places in two files of 10 and 6."""
    files = [torch.arange(10, dtype=torch.uint8), torch.arange(100, 106, dtype=torch.uint8)]
    found = windows(files, 3, [torch.Generator().manual_seed(0)] * 12_000)
    assert torch.equal(found.diff(dim=1), torch.ones(12_000, 2, dtype=torch.int64))
    starts, counts = found[:, 0].unique(return_counts=True)
    assert starts.tolist() == [*range(8), *range(100, 104)]
    assert (counts - 1000).abs().max() < 5 * 1000**0.5


def test_excerpts_are_the_middle():
    files = [torch.arange(10, dtype=torch.uint8), torch.arange(7, dtype=torch.uint8)]
    assert excerpts(files, 4, 5).tolist() == [[3, 4, 5, 6], [1, 2, 3, 4]]


def test_baselines_by_hand():
    """After 0 comes 1, three times of four; every pair has been seen 0.1 times besides."""
    train = [torch.tensor([0, 1, 0, 1, 0, 1, 0, 2], dtype=torch.uint8)]
    after_0 = 4 + 25.6
    want = -(math.log2(3.1 / after_0) + math.log2(3.1 / (3 + 25.6))) / 2
    assert bigram_bits(train, torch.tensor([[0, 1, 0]])) == pytest.approx(want, rel=1e-5)
    text = torch.zeros(2, 500, dtype=torch.int64)
    assert gzip_bits(text) == 8 * len(gzip.compress(bytes(500), 9, mtime=0)) / 500


def test_bits_of_a_uniform_guess():
    found = bits(torch.zeros(2, 3, 256), _text(2, 3))
    torch.testing.assert_close(found, torch.full((2, 3), 8.0))


def test_averages_by_doubling():
    ends, means = by_doubling(torch.arange(14.0)[None], 4)
    assert ends.tolist() == [4, 8, 14]
    assert means.tolist() == [[1.5, 5.5, 10.5]]


def test_the_rate_of_every_step():
    """A linear warm-up, then a cosine down to a fiftieth."""
    schedule = Schedule(steps=100, seconds=1.0, rows=1, piece=16, longest=64)
    peak, warmup = schedule.learning_rate, schedule.warmup
    assert schedule.rate(0, 0.0) == pytest.approx(peak / warmup)
    assert schedule.rate(warmup - 1, 0.0) == pytest.approx(peak)
    assert schedule.rate(10_000, 0.5) == pytest.approx(peak * 0.51)
    assert schedule.rate(10_000, 1.0) == pytest.approx(peak * 0.02)


def test_reading_in_pieces_and_forgetting():
    model, text = _model(), _text(2, 41)
    whole, _ = read(model, text, piece=40)
    pieces, _ = read(model, text, piece=7)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(stream(model, text).bits, whole)
    alone, _ = read(model, text, piece=20, fresh=True)
    torch.testing.assert_close(alone[:, :20], whole[:, :20])
    torch.testing.assert_close(alone[:, 20:], read(model, text[:, 20:], piece=20)[0])
    assert not torch.allclose(alone[:, 20:], whole[:, 20:])


def test_bytes_of_a_state_are_those_of_one_sequence():
    model = _model()
    sizes = [state_bytes(read(model, _text(rows, 9), piece=8)[1]) for rows in (1, 5)]
    # W and S of 8 -> 16 -> 8; k, v and gates of a chunk of 16; 3 inputs of 3 convolutions; length
    block = 4 * (2 * 2 * 2 * 8 * 16 + 16 * 2 * (2 * 8 + 3) + 3 * 3 * 16 + 1)
    assert sizes == [2 * block] * 2


def test_without_writing_nothing_is_written():
    model, text = _model(), _text(2, 60)
    _, states = read(model, text)
    assert not is_unwritten(model, states)
    silent = without_writing(model)
    _, states = read(silent, text)
    assert is_unwritten(silent, states)
    assert not torch.isinf(model.blocks[0].memory.theta_bias).any()  # a copy


def test_blocks_start_as_the_identity():
    x = torch.randn(2, 5, 16)
    assert torch.equal(Block(16, 2, 8)(x, None)[0], x)
