"""The plan on paper for many GPUs, by hand."""

import json

import pytest

from benchmarks import cluster


def test_a_plan_by_hand():
    """24 layers of 32 heads of 64 by 256: one row of a million tokens on 8 GPUs."""
    found = cluster.plan("titans", 10**6, 1, 8)
    # Matrices and their momenta; a chunk of k and v, bfloat16, and three gates; three taps.
    state = 32 * (2 * 2 * 64 * 256 * 4 + 16 * (2 * 64 * 2 + 3 * 4)) + 3 * 3 * 2048 * 2
    assert found.backward_bytes == state
    assert found.forward_bytes == state + 4 + 2048
    message = (2 * state + 4 + 2048) / 50e9 + 20e-6
    stage = 7813 * 16e-6 + message  # 125,000 tokens are 7,812.5 chunks
    dense = 24 * 72 * 2048**2 * 125_000 / (0.5 * 790e12)
    assert found.seconds == pytest.approx((7 + 24) * stage + dense, rel=1e-12)
    assert found.waiting == pytest.approx(7 * stage / found.seconds, rel=1e-12)
    assert found.memory_bytes == 125_000 * (24 * 2 * 2048 + 24 * 2048 + 128 * 32)
    assert found.rate == pytest.approx(10**6 / found.seconds)


def test_one_gpu_neither_sends_nor_waits():
    for model in ("titans", "tnt"):
        found = cluster.plan(model, 10**6, 8, 1)
        assert found.forward_bytes == found.backward_bytes == found.waiting == 0


def test_rows_run_side_by_side_on_one_gpu():
    """Eight rows of 32 heads are 256 memories, two for a multiprocessor: twice one, not eight."""
    one, eight = (cluster.plan("titans", 10**6, rows, 1) for rows in (1, 8))
    dense = 24 * 72 * 2048**2 * 10**6 / (0.5 * 790e12)
    assert eight.seconds - 8 * dense == pytest.approx(2 * (one.seconds - dense), rel=1e-9)


def test_rows_fill_the_chain():
    one, eight = (cluster.plan("titans", 10**7, rows, 64) for rows in (1, 8))
    assert eight.waiting < one.waiting / 2
    assert eight.rate > 1.5 * one.rate


def test_resets_pay_where_the_chain_is_long():
    """TNT has more to compute, and less to wait for."""
    assert (
        cluster.plan("tnt", 10**7, 1, 1024).rate > 2 * cluster.plan("titans", 10**7, 1, 1024).rate
    )


def test_what_it_prints(capsys):
    assert cluster.main([]) == 0
    text = capsys.readouterr().out
    assert "On paper" in text and "arXiv 2502.07563" in text
    assert cluster.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 32 and max(row["ranks"] for row in rows) == 1024
    assert max(row["tokens"] for row in rows) == 10**7
    assert all(0 <= row["waiting"] < 1 for row in rows)
