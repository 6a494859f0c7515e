"""The benchmarks run, record what they promise, and never time a wrong operator."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import __main__ as command
from benchmarks.reporting import report, style
from benchmarks.reporting.plots import draw
from benchmarks.running.breakdown import DISPATCH, PRODUCTS, PYTHON, group_of
from benchmarks.running.cases import CASES, OURS, TINY
from benchmarks.running.harness import FIELDS, QUICK, Row, measure, runner
from benchmarks.running.machine import describe
from benchmarks.running.memory import RESET, peak_growth
from benchmarks.running.providers import Task, our_operator
from benchmarks.running.shapes import BOTH, FORWARD, Shape, layer_flop
from titans_kernels import ops

ROOT = Path(__file__).parents[1]
BY_NAME = {case.name: case for case in CASES}
EFFORT = replace(QUICK, memory=False)
MACHINE = describe(1, 64)
MIB = 2**20


@pytest.mark.slow
def test_a_quick_run_records_everything(tmp_path):
    options = ["--quick", "--profile", "--out", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr

    [recorded] = tmp_path.glob("*-quick.json")
    record = json.loads(recorded.read_text())
    rows, machine = record["rows"], record["machine"]
    expected = [(c.name, m, p) for c in CASES for m in c.modes for p in c.providers]
    assert [(row["case"], row["mode"], row["provider"]) for row in rows] == expected
    for row in rows:
        assert tuple(row) == FIELDS
        if row["problem"] is not None:
            assert row["provider"].startswith("titans-pytorch") and "No module" in row["problem"]
            continue
        assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"]
        assert row["calls"] > 0 and row["tokens_per_s"] > 0 and row["time_ratio"] > 0
        assert row["peak_bytes"] >= 0
        if row["provider"] == OURS:
            assert row["time_ratio"] == 1 and 0 <= row["error"] <= BY_NAME[row["case"]].bound
            shares = row["flop"], row["of_ceiling"], row["least_bytes"], row["of_copy"]
            assert row["case"] == "decode" or all(share > 0 for share in shares)
    assert machine["matmul_flops"] > 0 and machine["threads"] == 1
    assert all(machine[name] for name in ("device", "torch", "python", "commit", "date"))
    for part in record["breakdowns"]:
        assert sum(share["share"] for share in part["shares"]) == pytest.approx(1)
        assert {PRODUCTS, PYTHON} <= {share["group"] for share in part["shares"]}

    text = recorded.with_suffix(".md").read_text()
    for case in CASES:
        assert f"## {case.name}" in text and case.about in text
        assert all(f"| {provider} |" in text for provider in case.providers)
    assert machine["commit"] in text and machine["date"] in text and record["command"] in text


def slightly_wrong(inputs, shape):
    task = our_operator(inputs, shape)
    return Task(lambda: task.call() * 1.001, task.leaves)


def wrong_gradient(inputs, shape):
    task = our_operator(inputs, shape)

    def call():
        o = task.call()
        return o + 0.001 * (o - o.detach())

    return Task(call, task.leaves)


def wrong_when_long(inputs, shape):
    task = our_operator(inputs, shape)
    long = inputs["q"].shape[1] > shape.checked
    return Task(lambda: task.call() + (0.001 if long else 0), task.leaves)


def not_a_number(inputs, shape):
    task = our_operator(inputs, shape)
    return Task(lambda: task.call() * float("nan"), task.leaves)


def with_ours(build):
    """The operator's case with another operator in place of ours."""
    case = BY_NAME["operator"]
    return replace(case, providers={**case.providers, OURS: build})


@pytest.mark.parametrize("fault", [slightly_wrong, wrong_gradient, wrong_when_long, not_a_number])
def test_a_wrong_operator_is_not_timed(fault):
    [row] = measure(with_ours(fault), TINY, BOTH, MACHINE, EFFORT)
    assert row.provider == OURS and "wrong" in row.problem
    assert row.median_s is None and row.time_ratio is None and row.calls is None
    assert "not timed" in report.line(row)


def test_a_wrong_operator_is_an_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "CASES", (with_ours(slightly_wrong),))
    assert command.main(["--quick", "--no-memory", "--json", "--out", str(tmp_path)]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [row["median_s"] for row in record["rows"]] == [None, None]


def test_a_missing_peer_is_reported():
    def absent(inputs, shape):
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    case = BY_NAME["operator"]
    case = replace(case, providers={OURS: our_operator, "peer": absent})
    ours, peer = measure(case, TINY, FORWARD, MACHINE, EFFORT)
    assert ours.problem is None and ours.median_s > 0
    assert "No module named 'peer'" in peer.problem and peer.median_s is None


def batched_product(out, a, b, *_, out_shape=None, **__):
    return 2 * a[0] * a[1] * a[2] * b[2]


IN_PLACE = {torch.ops.aten.baddbmm_: batched_product}


def inside(op):
    """A counter of the products that a custom op does, which is one operation from outside."""

    def count(*args, out_val=None):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            op._init_fn(*args)
        return counter.get_total_flops()

    count._get_raw = True  # wants tensors, not shapes
    return count


@pytest.mark.parametrize("mode", [FORWARD, BOTH])
@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_formula_counts_the_products_that_are_done(chunk, mode):
    """All but those of the gates' coefficients, less than a twentieth."""
    case, shape = BY_NAME["layer"], Shape(T=256, chunk=chunk, H=2)
    task = case.providers[OURS](case.made(shape, shape.T), shape)
    custom = torch.ops.titans_kernels
    counted = IN_PLACE | {
        custom.neural_memory: inside(ops._memory),
        custom.neural_memory_backward: inside(ops._memory_backward),
    }
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        if mode == BOTH:
            task.call().sum().backward()
        else:
            runner(task, mode)()
    formula = layer_flop(shape, mode)
    assert formula <= counter.get_total_flops() <= 1.05 * formula


def test_pictures_of_what_there_are_rows_for(tmp_path):
    def row(case, provider=OURS, mode=FORWARD, **size):
        shape = Shape(**{"T": 64, "H": 4, **size})
        found = Row(
            case, shape, mode, provider, median_s=1e-3, peak_bytes=MIB, flop=1, of_ceiling=0.5
        )
        return replace(found, least_bytes=1, time_ratio=2.0, memory_ratio=2.0).record()

    def drawn(*rows):
        record = tmp_path / "run.json"
        record.write_text(json.dumps({"machine": asdict(MACHINE), "rows": rows}))
        return {path.stem.removeprefix("run-") for path in draw(record) if path.stat().st_size}

    modes = [{"mode": mode, "chunk": chunk} for mode in (FORWARD, BOTH) for chunk in (16, 64)]
    assert drawn() == set()
    assert drawn(row("sizes")) == set()  # one chunk size compares with none
    assert drawn(*(row("sizes", **how) for how in modes)) == {"chunks"}
    assert drawn(*(row("operator", **how) for how in modes)) == {"time", "memory", "roofline"}
    assert drawn(row("layer", "titans-pytorch")) == {"time", "memory", "ratios"}
    assert drawn(row("decode", "titans-pytorch")) == {"ratios"}


def test_a_picture_says_what_is_in_it(tmp_path, monkeypatch):
    """The peers and ours, and the dtype of its own rows, not of all that were recorded."""
    sizes = [("operator", OURS), ("operator", "SDPA causal"), ("layer", "titans-pytorch")]
    sizes += [("layer-paper", "titans-pytorch paper"), ("bfloat16", OURS)]
    rows = [
        Row(case, TINY, FORWARD, provider, median_s=1e-3, dtype=dtype)
        for case, provider in sizes
        for dtype in ["bfloat16" if case == "bfloat16" else "float32"]
    ]
    record = tmp_path / "run.json"
    machine = asdict(MACHINE)
    record.write_text(json.dumps({"machine": machine, "rows": [row.record() for row in rows]}))
    saved = {}
    monkeypatch.setattr(
        style, "save", lambda figure, path, source: saved.update({path.stem: (figure, source)})
    )
    draw(record)
    figure, source = saved["run-time"]
    assert "float32" in source and "bfloat16" not in source
    assert len(figure.axes) == 1  # of the one mode that there are rows for
    [legend] = figure.legends
    drawn = {text.get_text() for text in legend.get_texts()}
    assert drawn == {
        f"{OURS}, operator, chunk 16",
        "SDPA causal",
        "titans-pytorch, layer",
        "titans-pytorch, paper form, layer",
    }


def allocates(inputs, shape):
    """64 MiB in pieces. As much was freed before, below a piece that keeps the heap large."""

    def call():
        return [torch.ones(2 * MIB) for _ in range(8)]

    del call()[:]  # from now on glibc takes pieces of this size from its heap
    pieces = call()
    last = torch.ones(1000)
    del pieces
    return Task(call, [last])


@pytest.mark.skipif(not RESET.exists(), reason="no /proc/self/clear_refs")
def test_peak_memory_is_what_a_call_adds():
    case = replace(BY_NAME["operator"], providers={OURS: allocates})
    grown = peak_growth(case, OURS, TINY, FORWARD, threads=1)
    assert 60 * MIB < grown < 72 * MIB


@pytest.mark.parametrize(
    ("event", "group"),
    [
        ("aten::baddbmm_", PRODUCTS),
        ("aten::silu_backward", "activations"),
        ("aten::addcmul_", "elementwise"),
        ("aten::index_select", "indexing and copies"),
        ("aten::_to_copy", DISPATCH),
        ("aten::view", DISPATCH),
        ("ChunkedMemoryBackward", PYTHON),
    ],
)
def test_groups_of_operations(event, group):
    assert group_of(event) == group


# ------------------------------------------------------------------------------ figures, by hand

harness, shapes = (sys.modules[x.__module__] for x in (measure, Shape))


def sleeping(seconds):
    """Ours, after a pause: what a call takes is then known."""

    def build(inputs, shape):
        task = our_operator(inputs, shape)

        def call():
            time.sleep(seconds)
            return task.call()

        return Task(call, task.leaves)

    return build


def test_figures_of_runners_that_sleep():
    case = BY_NAME["operator"]
    case = replace(case, providers={OURS: sleeping(0.01), "peer": sleeping(0.05)})
    effort = replace(EFFORT, rounds=3, round_seconds=0.02)
    ours, peer = measure(case, TINY, FORWARD, MACHINE, effort)
    assert 0.01 < ours.median_s < 0.03 < 0.05 < peer.median_s < 0.1
    assert ours.time_ratio == 1 and 2 < peer.time_ratio < 5.5
    for row in (ours, peer):
        assert row.p20_s <= row.median_s <= row.p80_s
        assert row.tokens_per_s == pytest.approx(TINY.B * TINY.T / row.median_s)
    assert ours.flop == case.flop[OURS](TINY, FORWARD)
    assert ours.of_ceiling == pytest.approx(ours.flop / ours.median_s / MACHINE.matmul_flops)
    assert ours.of_copy == pytest.approx(ours.least_bytes / ours.median_s / MACHINE.copy_bytes)


def test_what_is_timed():
    """One call, without gradients; or one call and the gradient of every leaf."""
    x, calls = torch.ones(3, requires_grad=True), []

    def call():
        calls.append(torch.is_grad_enabled())
        return x**2

    task = Task(call, (x,))
    assert not runner(task, FORWARD)().requires_grad and calls == [False]
    [gradient] = runner(task, BOTH)()
    assert gradient.tolist() == [2.0] * 3 and calls == [False, True]


def test_bytes_and_operations_by_hand():
    shape = Shape(T=10, B=2, H=3, D=4)  # hidden 16
    case, leaves = BY_NAME["operator"], (torch.zeros(5), torch.zeros(7, dtype=torch.float64))
    moved = 2 * 10 * 12 * 4 + 5 * 4 + 7 * 8
    for mode, times in ((FORWARD, 1), (BOTH, 2)):
        task = Task(lambda: None, leaves)
        assert harness.least_bytes(task, case, shape, mode) == times * moved
    # Two products of a token with [4, 16], for 2 x 10 tokens and 3 heads.
    assert shapes.reading_flop(shape, FORWARD) == 60 * 2 * (2 * 4 * 16)
    # Two products of [10, 4] and [4, 10], of which half is needed; seven with the backward pass.
    assert shapes.attention_flop(shape, FORWARD) == 6 * 2 * (2 * 10 * 10 * 4) // 2
    assert shapes.attention_flop(shape, BOTH) == 6 * 7 * (2 * 10 * 10 * 4) // 2


def test_nothing_below_a_picture_is_cut_off(tmp_path):
    """Long names of machines take more lines."""
    figure, _ = style.panels(5, 3.8)
    source = "NVIDIA H100 80GB HBM3, 1 thread(s), bfloat16, float32, torch 2.13.0+cu130, commit "
    style.save(figure, tmp_path / "a.png", source + "15374c8-dirty, 2026-11-23; worst to best seed")
    [text] = figure.texts
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1
    assert box.y1 <= 0.55 / 3.8 * figure.bbox.y1
