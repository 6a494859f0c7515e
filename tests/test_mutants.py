"""Faults that must turn a test red: all stand in the table as they should, a tenth are planted."""

import os
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_table_holds_faults_of_every_package():
    table = mutants.faults()
    assert len(set(table)) == len(table) >= 150
    stale = []
    for fault in table:
        try:
            compile(fault.source(), fault.file, "exec")
        except (LookupError, FileNotFoundError) as error:
            stale.append(str(error))
        assert (ROOT / "tests" / fault.test.split("::")[0]).is_file(), fault
    assert not stale, "lines of faults.txt that no longer fit:\n" + "\n".join(stale)
    packages = {path.parent.name for path in ROOT.glob("titans_kernels/**/*.py")}
    assert packages | {"reference"} <= {Path(fault.file).parent.name for fault in table}


@pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted in the interpreter")
def test_a_tenth_of_them_is_noticed():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mutants", "--every", "10"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_line_that_does_not_fit_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "TABLE", tmp_path / "faults.txt")
    mutants.TABLE.write_text("a.py ;; b ;; c\n")
    with pytest.raises(ValueError, match=r"faults\.txt:1: got 3 parts, takes 4"):
        mutants.faults()
    file = "titans_kernels/packing.py"
    for old, times in (("no such text", 0), ("return", r"\d+")):
        with pytest.raises(LookupError, match=f"got '{old}' {times} times, takes it once"):
            mutants.Fault(file, old, "pass", "").source()


def test_a_test_that_never_ends_gives_no_verdict(monkeypatch, tmp_path):
    """Whether it computes, or waits."""
    monkeypatch.setattr(mutants, "LIMIT", 1)
    monkeypatch.setattr(mutants, "HANGS", 20)
    fault = mutants.faults()[0]
    for body in ("while True: pass", "__import__('time').sleep(1000)"):
        (tmp_path / "test_endless.py").write_text(f"def test():\n    {body}\n")
        endless = fault._replace(test=os.path.relpath(tmp_path / "test_endless.py", ROOT / "tests"))
        ((_, wrong),) = mutants.survivors([endless])
        assert wrong.startswith("NO VERDICT")
