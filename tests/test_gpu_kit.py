"""The GPU kit, from the first step to the page, on a CPU: tiny, interpreted, saying nothing."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import RESULTS
from benchmarks.gpu import collect
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.kit import AGAIN, MORE, Kit, Step, program, work
from benchmarks.gpu.matrix import REHEARSED, cases
from benchmarks.gpu.stages import METRICS, STAGES, counters
from benchmarks.machine_code.model import forward_flop, predict, tnt
from benchmarks.reporting import page
from benchmarks.reporting.plots import draw
from benchmarks.running.cases import OURS
from benchmarks.running.harness import Row
from benchmarks.running.journal import Journal
from benchmarks.running.machine import describe
from benchmarks.running.providers import RESET
from benchmarks.running.shapes import BOTH, FORWARD, Shape

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_rehearsal(tmp_path):
    """All stages in a few calls; what came back becomes results and a page."""
    out = tmp_path / "out"
    assert _call("tests", "verify", "--out", out) == 0
    done = Journal(out / "gpu.jsonl")
    assert len(done.stage("tests")) == 3 and len(done.stage("verify")) == 1

    moved = tmp_path / "gpu.jsonl"  # a new machine, which gets the old one's file along
    (out / "gpu.jsonl").rename(moved)
    assert _call("--out", out, "--earlier", moved) == 0
    journal = Journal(out / "gpu.jsonl")
    assert {step: journal.get("tests", step) for step in done.stage("tests")} == done.stage("tests")
    problems = {
        row["problem"]
        for stage in STAGES
        for row in journal.stage(stage).values()
        if "problem" in row
    }
    assert problems <= {"ncu is not here", "compute-sanitizer is not here"}
    assert all("begun" not in row for stage in STAGES for row in journal.stage(stage).values())
    timed = [row for step in journal.stage("bench").values() for row in step.get("rows", ())]
    assert {row["case"] for row in timed} == set(REHEARSED)
    assert "No module named 'fla'" in str(timed) or "fla" in sys.modules

    copy = tmp_path / "benchmarks.md"
    copy.write_text("Before\n<!-- GPU figures, x -->\nold\n<!-- end of GPU figures -->\nafter\n")
    with mock.patch.object(page, "_on_gpu", lambda run: True):
        collect.main([str(out), "--out", str(tmp_path / "results"), "--page", str(copy)])
    [record] = (tmp_path / "results").glob("*.json")
    text = record.with_suffix(".md").read_text()
    assert all(f"## {stage}" in text for stage in STAGES if stage != "bench")
    assert "## operator" in text and "Tile(" in text
    machine = json.loads(record.read_text())["machine"]
    assert machine["commit"] == "abc1234" and machine["triton"]
    table = copy.read_text()
    assert table.startswith("Before\n") and table.endswith("after\n") and "old" not in table
    assert "| operator, forward |" in table and "abc1234" in table


def _call(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    command += ["--rehearse", "--commit", "abc1234", "--minutes", "3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, MORE), done.stdout + done.stderr
    return done.returncode


def test_the_documentation_says_what_was_recorded():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.BLOCK.search(text)
    assert page.refreshed(text, RESULTS) == text


# ----------------------------------------------------------------------------- how steps are worked


def _kit(tmp_path, seconds=100.0):
    return Kit(Journal(tmp_path / "gpu.jsonl"), time.monotonic() + seconds, rehearse=True)


def test_steps_are_done_once_and_problems_are_results(tmp_path):
    calls = []

    def fails():
        calls.append("b")
        raise RuntimeError("no such thing\nand more")

    def steps(kit):
        yield Step("a", lambda: calls.append("a") or {"error": 0.5})
        yield Step("b", fails)
        assert kit.journal.get("s", "b")["problem"]  # what comes next may depend on it

    assert work(_kit(tmp_path), {"s": steps}) == 0
    assert work(_kit(tmp_path), {"s": steps}) == 0
    assert calls == ["a", "b"]
    rows = Journal(tmp_path / "gpu.jsonl").stage("s")
    assert rows["a"]["error"] == 0.5 and rows["b"]["problem"] == "RuntimeError: no such thing"


def test_a_step_that_has_no_time_is_not_begun(tmp_path):
    def steps(kit):
        yield Step("long", lambda: {}, seconds=1000)

    assert work(_kit(tmp_path), {"s": steps}) == MORE
    assert Journal(tmp_path / "gpu.jsonl").stage("s") == {}


def test_a_step_that_takes_its_process_along_is_left_after_two_attempts(tmp_path):
    def steps(kit):
        yield Step("deadly", lambda: sys.exit(-11))
        yield Step("next", lambda: {})

    for _ in range(2):
        with pytest.raises(SystemExit):
            work(_kit(tmp_path), {"s": steps})
    assert work(_kit(tmp_path), {"s": steps}) == 0
    rows = Journal(tmp_path / "gpu.jsonl").stage("s")
    assert rows["deadly"]["problem"] == "did not end in 2 attempts" and "next" in rows


def test_a_lost_gpu_takes_a_new_process(tmp_path):
    def steps(kit):
        yield Step("illegal", lambda: {"problem": "illegal memory access"})

    with mock.patch("benchmarks.gpu.kit.alive", return_value=False):
        assert work(_kit(tmp_path), {"s": steps}) == AGAIN
    assert work(_kit(tmp_path), {"s": steps}) == 0


def test_a_program_is_stopped_in_time(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert program(_kit(tmp_path, 0.0), command) == {"unfinished": True}
    found = program(_kit(tmp_path), [sys.executable, "-c", "print('a'); raise SystemExit(9)"])
    assert found == {"exit": 9, "tail": "a\n", "problem": "exit code 9"}


def test_going_on_in_a_new_process_ends(tmp_path, capfd):
    """A child that always dies: the command goes on until its time is over, not for ever."""
    codes = [mock.Mock(returncode=code) for code in (-11, AGAIN, MORE)]
    with mock.patch("subprocess.run", side_effect=codes):
        assert main(["--out", str(tmp_path), "--minutes", "1"]) == MORE
    assert capfd.readouterr().out.count("continuing in a new process") == 2


def test_counters_are_read():
    names = list(METRICS)
    text = "\n".join(
        (
            "==PROF== Connected",
            ",".join(f'"{x}"' for x in ("ID", "Kernel Name", *names)),
            ",".join(f'"{x}"' for x in ("", "", *["%"] * len(names))),
            ",".join(f'"{x}"' for x in ("0", "scan_kernel(p)", *range(len(names)))),
        )
    )
    [row] = counters(text)
    assert row["kernel"] == "scan_kernel" and row["ns"] == "0" and row["% warps active"] == "3"
    assert counters("no table") == []


def test_pictures_of_a_gpu(tmp_path):
    """A made-up run: its roofline needs what the machine copies."""
    shape = Shape(2048, B=8, H=16)
    row = Row("operator", shape, FORWARD, OURS, median_s=1e-3, flop=forward_flop(shape, FORWARD))
    machine = asdict(describe(1, 64)) | {"copy_bytes": 4e12, "driver": "1"}
    record = tmp_path / "gpu.json"
    record.write_text(json.dumps({"machine": machine, "rows": [row.record()]}))
    assert {path.name for path in draw(record)} == {"gpu-time.png", "gpu-roofline.png"}


def test_shards_fill_a_gpu_on_paper():
    """One sequence has too few programs, and its shards enough; where there are enough, none."""
    few, many = (Shape(32768, B=B, H=16) for B in (1, 8))
    local, whole = tnt(few)
    assert local < sum(predict(few).values()) / 4 and local + whole < sum(predict(few).values())
    assert tnt(many)[0] == pytest.approx(sum(predict(many).values()))
    assert tnt(many, BOTH)[1] > tnt(many)[1]


def test_the_matrix_has_the_operator_with_resets():
    (case,) = (case for case in cases() if case.name == "resets")
    assert list(case.providers) == [OURS, "with resets"] and case.device == "cuda"
    assert all(shape.T > RESET for shape in case.shapes)
