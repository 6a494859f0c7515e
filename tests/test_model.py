"""The model of cost: by hand, and never faster than what the machine code needs."""

import pytest

from benchmarks.machine_code import hardware, model, static
from benchmarks.machine_code.hardware import GPUS, H100, H200, demand
from benchmarks.machine_code.model import BACKWARD_PASSES, FORWARD_PASSES, cost, predict
from benchmarks.machine_code.published import delta_rule, sdpa
from benchmarks.running.shapes import BOTH, FORWARD, Shape

FULL = Shape(8192, 16, 8, 16, 64)  # 128 heads of all sequences: a program to a multiprocessor


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_no_pass_is_faster_than_the_machine(gpu, D, mode):
    for B, T, chunk in ((1, 2048, 16), (8, 8192, 64), (64, 2048, 16)):
        shape = Shape(T, chunk, B, 16, D)
        tokens, block = B * T * 16, model._tile(shape, mode, "sm_90").block
        for name, seconds in predict(shape, mode, gpu=gpu).items():
            needs = demand(name, D, 4 * D, chunk, mode == BOTH)
            least = cost(name, D, 4 * D, block, chunk, T)
            assert seconds >= tokens * needs.instructions / (4 * 132 * 1.755e9)
            assert seconds >= tokens * needs.bytes / (128 * 132 * 1.755e9)
            assert seconds >= tokens * least.bytes / gpu.cache
            assert seconds >= tokens * (least.bytes - least.running) / gpu.bytes
            assert seconds >= tokens * least.flop / gpu.flops
            if name.startswith("scan"):  # a chunk takes no less than its own instructions
                own = chunk * needs.instructions / (4 * 1.755e9)
                assert seconds >= T / chunk * own * (1 - 1e-9)


def test_scan_by_hand():
    """4 warps, one to a scheduler: an instruction every other cycle. Two programs take turns."""
    each = demand("scan", 64, 256, 16, False).instructions
    alone = 2 * 8192 * each / (4 * 1.755e9)
    assert predict(FULL)["scan"] == pytest.approx(alone)
    assert predict(Shape(8192, 16, 9, 16, 64))["scan"] == pytest.approx(alone)


def test_issue_floor_of_the_shipped_tiles():
    """What half the instructions are: 4.1 and 13.8 ms in blocks of 128 and with 8 warps."""
    assert model.issue(FULL) <= 2.6e-3
    assert model.issue(FULL, BOTH) <= 10.5e-3
    once = sum(demand(name, 64, 256, 16, False).instructions for name in FORWARD_PASSES)
    assert model.issue(FULL) == pytest.approx(8 * 8192 * 16 * once / (4 * 132 * 1.755e9))


def test_counts_are_those_of_the_shipped_kernels():
    """`python -m benchmarks.machine_code.hardware` and `static --record` see the same code."""
    ceilings = static.recorded()["3.9"]
    for D in hardware.HEAD_DIMS:
        for name in BACKWARD_PASSES:
            size = f"D {D}"
            if name.startswith("coefficients"):
                size = f"block {model._tile(Shape(16, D=D), BOTH, 'sm_90').block}"
            recorded = ceilings[f"{name}, {size}, sm_90"]["instructions a token"]
            # One is rounded to a tenth, the other up.
            assert recorded - 1.05 <= demand(name, D, 4 * D, 16, True).instructions <= recorded


def test_running_states_stay_in_the_cache_where_they_fit():
    """128 programs of 64 by 256 keep 34 MB, of 128 by 512 134 MB."""
    large = Shape(8192, 16, 8, 16, 128)
    each = cost("scan", 128, 512, model._tile(large, FORWARD, "sm_90").block, 16, 8192)
    tokens = 8 * 16 * 8192
    assert predict(large, gpu=H100)["scan"] >= tokens * each.bytes / H100.bytes
    each = cost("scan", 64, 256, 64, 16, 8192)
    assert predict(FULL, gpu=H100)["scan"] < tokens * each.bytes / H100.bytes * 1.2


def test_an_h100_is_the_slower_memory():
    for name, seconds in predict(FULL, BOTH).items():
        assert seconds <= predict(FULL, BOTH, gpu=H100)[name]
    assert H100.issue == H200.issue and H100.bytes < H200.bytes


def test_what_scan_leaves_idle_hides_retrieve_but_of_the_last_group():
    """Eight groups of 1,024 tokens, 16 programs of scan on 132 multiprocessors."""
    few = Shape(8192, 16, 1, 16, 64)
    retrieve = predict(few)["retrieve"]
    assert model.hidden(few, FORWARD) == pytest.approx(7 / 8 * retrieve)
    assert model.call(few) == pytest.approx(sum(predict(few).values()) - 7 / 8 * retrieve)
    assert model.hidden(Shape(1024, 16, 8, 16, 64), FORWARD) == 0
    full = Shape(8192, 16, 1000, 16, 64)  # no scheduler is ever without a warp that is ready
    assert model.hidden(full, FORWARD) < 0.1 * predict(full)["retrieve"]


def test_launches_and_peers_by_hand():
    assert model.launches(FULL) == pytest.approx(8 * 3 * 3e-6)
    assert model.launches(FULL, BOTH) == pytest.approx((8 * 3 + 4 * 8) * 3e-6)
    attention = 2 * 128 * 8192**2 * 64
    assert sdpa(FULL, FORWARD) == pytest.approx(attention / 460e12)
    assert sdpa(FULL, BOTH) == pytest.approx(attention / 460e12 + 2.5 * attention / 472e12)
    assert sdpa(Shape(32768, D=128), FORWARD) == pytest.approx(2 * 6 * 32768**2 * 128 / 616e12)
    assert sdpa(Shape(2048, D=32), FORWARD) is None and delta_rule(FULL, FORWARD) is None
    assert delta_rule(Shape(8192, 16, 8, 16, 128), BOTH) == pytest.approx(7.295e-3)


def test_the_table_has_every_figure():
    rows = [row for row in model.compared() if row.startswith("| H")]
    assert len(rows) == 2 * 2 * 3 * 2 * 2
    assert all(row.count("-") <= 1 for row in rows)
