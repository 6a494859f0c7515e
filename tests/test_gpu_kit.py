"""The GPU kit, from the first step to the page, on a CPU: tiny, interpreted, saying nothing."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import reference
from benchmarks import RESULTS
from benchmarks.gpu import collect
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.kit import AGAIN, MORE, Kit, Step, blame, program, work
from benchmarks.gpu.matrix import REHEARSED, cases
from benchmarks.gpu.stages import METRICS, STAGES, counters
from benchmarks.machine_code.model import call, forward_flop, tnt
from benchmarks.reporting import page
from benchmarks.reporting.plots import draw
from benchmarks.running import providers
from benchmarks.running.cases import OURS, TINY
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
    _killed("first", "--out", out, journal=out / "gpu.jsonl", after=2)
    kept = _finished(out / "gpu.jsonl", "first")
    assert len(kept) >= 2

    moved = tmp_path / "gpu.jsonl"  # a new machine, which gets the old one's file along
    (out / "gpu.jsonl").rename(moved)
    calls = [_call("--out", out, "--earlier", moved)]
    while calls[-1] == MORE and len(calls) < 5:
        calls.append(_call("--out", out))
    assert calls[-1] == 0
    journal = Journal(out / "gpu.jsonl")
    rows = journal.stage("first")
    assert kept.items() <= rows.items() and len(journal.stage("verify")) == 1
    assert {"environment", "compile", "outputs", "gradients", "decoding"} < rows.keys()
    timed = [row["by_kernel"] for row in rows.values() if "by_kernel" in row]
    assert len(timed) == 3 and all(
        row.keys() & {"scan_kernel", "short_kernel"} and "recall_kernel" in row for row in timed
    )
    outcomes = [row.get("outcome") for row in journal.stage("tests").values()]
    assert outcomes.count("passed") >= 1 and "failed" not in outcomes
    problems = {
        row["problem"]
        for stage in STAGES
        for row in journal.stage(stage).values()
        if "problem" in row
    }
    assert problems <= {"ncu is not here", "compute-sanitizer is not here"}
    assert all("begun" not in row for stage in STAGES for row in journal.stage(stage).values())
    steps = (journal.stage("bench") | journal.stage("more")).values()
    timed = [row for step in steps for row in step.get("rows", ())]
    assert {row["case"] for row in timed} == set(REHEARSED)
    assert "No module named 'fla'" in str(timed) or "fla" in sys.modules

    copy = tmp_path / "benchmarks.md"
    copy.write_text("Before\n<!-- GPU figures, x -->\nold\n<!-- end of GPU figures -->\nafter\n")
    with mock.patch.object(page, "_on_gpu", lambda run: True):
        collect.main([str(out), "--out", str(tmp_path / "results"), "--page", str(copy)])
    [record] = (tmp_path / "results").glob("*.json")
    text = record.with_suffix(".md").read_text()
    assert all(f"## {stage}" in text for stage in STAGES if stage not in ("bench", "more"))
    assert "## operator" in text and "Tile(" in text
    machine = json.loads(record.read_text())["machine"]
    assert machine["commit"] == "abc1234" and machine["triton"]
    table = copy.read_text()
    assert table.startswith("Before\n") and table.endswith("after\n") and "old" not in table
    assert "| operator, forward |" in table and "abc1234" in table


def _command(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, arguments)]
    return [*command, "--rehearse", "--commit", "abc1234", "--minutes", "3"]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def _call(*arguments):
    command = _command(*arguments)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode in (0, MORE), done.stdout + done.stderr
    return done.returncode


def _finished(path, stage):
    rows = Journal(path).stage(stage) if path.exists() else {}
    return {step: row for step, row in rows.items() if "begun" not in row}


def _killed(stage, *arguments, journal, after):
    """Run it until so many steps are done, then kill all of it at once."""
    command = _command(stage, *arguments)
    run = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while len(_finished(journal, stage)) < after:
        assert run.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()


def test_the_documentation_says_what_was_recorded():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.BLOCK.search(text)
    assert page.refreshed(text, RESULTS) == text


# ----------------------------------------------------------------------------- how steps are run


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
        blame(Journal(tmp_path / "gpu.jsonl"), ["s"])
    assert work(_kit(tmp_path), {"s": steps}) == 0
    rows = Journal(tmp_path / "gpu.jsonl").stage("s")
    assert rows["deadly"]["problem"] == "did not end in 2 attempts" and "next" in rows


def _many_steps(folder, begun):
    """Sixty short steps, each leaving a long row; in a process of its own."""

    def run(i):
        time.sleep(0.005)
        with (folder / "done").open("a") as file:
            file.write(f"{i} ")
        return {"value": i, "long": "x" * 5000}

    def steps(kit):
        for i in range(60):
            yield Step(str(i), lambda i=i: run(i))

    journal = Journal(folder / "gpu.jsonl")
    journal.keep()
    begun.set()
    os._exit(work(Kit(journal, time.monotonic() + 100, rehearse=True), {"s": steps}))


def test_killing_it_at_any_moment_costs_the_step_in_flight(tmp_path):
    processes, turn = multiprocessing.get_context("fork"), random.Random(0)
    path, kills, before = tmp_path / "gpu.jsonl", 0, {}
    while True:
        begun = processes.Event()
        run = processes.Process(target=_many_steps, args=(tmp_path, begun))
        run.start()
        begun.wait()
        run.join(turn.uniform(0.0, 0.2) if kills < 20 else None)
        if run.exitcode is None:
            run.kill()
            run.join()
            kills += 1
        now = _finished(path, "s")
        assert before.items() <= now.items()
        before = now
        if run.exitcode == 0:
            break
        assert run.exitcode == -signal.SIGKILL
    assert kills >= 2 and [row["value"] for row in before.values()] == list(range(60))
    assert len((tmp_path / "done").read_text().split()) <= 60 + kills


def test_a_torn_line_spoils_no_other(tmp_path):
    journal = Journal(tmp_path / "gpu.jsonl")
    journal.add("s", "whole", {"value": 1})
    with journal.path.open("a") as file:
        file.write('{"stage": "s", "step": "torn", "val')
    Journal(journal.path).add("s", "next", {"value": 2})
    assert Journal(journal.path).stage("s") == {"whole": {"value": 1}, "next": {"value": 2}}


def test_rewriting_a_journal_is_never_half_done(tmp_path):
    journal = Journal(tmp_path / "gpu.jsonl")
    journal.add("s", "a", {"value": 1})
    with mock.patch("os.replace", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        journal.keep()
    assert Journal(journal.path).stage("s") == {"a": {"value": 1}}


def test_the_end_of_a_call_is_no_failed_attempt(tmp_path):
    """A suite may take many calls."""
    turns = iter([*({"unfinished": True} for _ in range(4)), {"exit": 0}])

    def steps(kit):
        yield Step("suite", lambda: next(turns))

    codes = [work(_kit(tmp_path), {"s": steps}) for _ in range(5)]
    assert codes == [MORE] * 4 + [0]
    assert Journal(tmp_path / "gpu.jsonl").stage("s")["suite"]["exit"] == 0


def test_every_test_is_a_result_of_its_own(tmp_path):
    """A suite that is stopped in the middle goes on with the tests that it has not run."""
    file = tmp_path / "test_some.py"
    file.write_text(
        "import os\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_last():\n"
        "    if 'ENDS' in os.environ: os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu.suite", "-p"]
    command += ["no:cacheprovider", "--rootdir", tmp_path, "-c", os.devnull, file]
    environment = ENVIRONMENT | {"GPU_JOURNAL": str(tmp_path / "gpu.jsonl")}
    environment["PYTHONPATH"] = str(ROOT)
    runs = [
        subprocess.run(command, env=environment | more, capture_output=True, text=True, cwd=ROOT)
        for more in ({"ENDS": "1"}, {})
    ]
    assert [run.returncode for run in runs] == [9, 0], runs[0].stdout + runs[1].stdout
    assert "1 passed, 2 deselected" in runs[1].stdout
    rows = Journal(tmp_path / "gpu.jsonl").stage("tests")
    outcomes = {name.split("::")[1]: row["outcome"] for name, row in rows.items()}
    assert outcomes == {"test_good": "passed", "test_bad": "failed", "test_last": "passed"}
    assert "1 == 2" in str(rows)


def test_what_says_most_comes_first():
    assert list(STAGES)[:5] == ["first", "bench", "tiles", "tune", "ncu"]


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
    Journal(tmp_path / "gpu.jsonl").add("bench", "deadly", {"begun": 0})
    codes = [mock.Mock(returncode=code) for code in (-11, AGAIN, MORE)]
    with mock.patch("subprocess.run", side_effect=codes):
        assert main(["--out", str(tmp_path), "--minutes", "1"]) == MORE
    assert Journal(tmp_path / "gpu.jsonl").get("bench", "deadly") == {"begun": 1}
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
    """One sequence has too few programs, and its shards enough. Where there is one program to every
    multiprocessor, shards gain nothing: so many running states do not fit the L2 cache."""
    few, many = (Shape(32768, B=B, H=16) for B in (1, 8))
    local, whole = tnt(few)
    assert local < call(few) / 4 and local + whole < call(few)
    assert call(many) < tnt(many)[0] < 1.25 * call(many)
    assert tnt(many, BOTH)[1] > tnt(many)[1]


def test_the_matrix_has_the_operator_with_resets():
    (case,) = (case for case in cases() if case.name == "resets")
    expected = [OURS, "with resets", "TNT, both memories"]
    assert list(case.providers) == expected and case.device == "cuda"
    assert all(shape.T > RESET for shape in case.shapes)


def test_tnt_is_a_global_memory_and_a_local_one():
    shape = replace(TINY, T=24, H=1)
    inputs = providers.operator_inputs(shape, shape.T, torch.float64)
    o = providers.our_tnt(inputs, shape).call()
    whole = reference.neural_memory(**inputs, chunk_size=providers.RESET, read="chunk")[0]
    local = reference.neural_memory(**inputs, chunk_size=shape.chunk, reset_every=providers.RESET)[
        0
    ]
    torch.testing.assert_close(o, whole + local, rtol=0, atol=1e-11)
