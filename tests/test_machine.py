"""The emulator of PTX is proven: known outputs, and every planted fault is found."""

import json
import os
import subprocess
import sys

import pytest


def run(module: str, *arguments: str, triton: str = "") -> str:
    """What a module prints in a process of its own, which compiles kernels: nothing interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [triton, os.getcwd(), *sys.path]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    command = [sys.executable, "-m", f"triton_support.machine{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.wide)])
def test_known_answers_and_planted_faults(arch):
    printed = run(".proof", "--arch", arch)
    assert printed.count("launches") == 2 and "planted and found" in printed


def test_the_package_decodes_and_trains_on_the_compilers_code():
    """The rest of the table of docs/machine.md is `make machine`'s."""
    for case, dtype in (("decode", "bfloat16"), ("initial state", "bfloat16")):
        (record,) = run("", "--cases", case, "--dtypes", dtype).splitlines()
        row = json.loads(record)
        assert row["case"] == case and not row["faults"] and row["rms"] <= 1.25
        assert row["products"] > 10, "no tensor cores"


@pytest.mark.wide
@pytest.mark.parametrize("case", ["D 64", "D 64, chunk 64", "D 64, packed", "D 128"])
def test_tiles_that_ship(case):
    (record,) = run("", "--cases", case, "--dtypes", "bfloat16").splitlines()
    assert not json.loads(record)["faults"]
