"""`make demo` at a size that shows only that it runs, from training to the numerics check."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo is an extra")
ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_runs(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "titans_kernels.demo", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr

    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) bits", ran.stdout).groups())
    assert last < first - 1, "training does not train"
    shown = dict(
        re.findall(r"^  (memory writing|writing switched off) +([\d.]+)$", ran.stdout, re.M)
    )
    on, off = float(shown["memory writing"]), float(shown["writing switched off"])
    assert 0 < on < 8 and 0 < off < 8 and on != off
    begins, ends = re.search(r"State of one file: (\d+) KiB .*?, (\d+) KiB", ran.stdout).groups()
    assert begins == ends, "the state grows"
    assert "all ok" in ran.stdout

    plot = (tmp_path / "memory_learns.png").read_bytes()
    assert plot.startswith(b"\x89PNG") and len(plot) > 10_000
