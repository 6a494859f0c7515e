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


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.wide)])
def test_a_token_is_decoded_in_place_on_the_compilers_code(arch):
    """In float32, and in bfloat16 as far as its rounding of the projections goes."""
    single, half = map(json.loads, run(".step", "--arch", arch).splitlines())
    assert single["launches"] == ["prepare_kernel", "short_kernel", "finish_kernel"] * 3
    assert single["error"] < 1e-6 and half["error"] < 1e-2


def test_what_is_executed_is_what_is_counted_along_loops():
    """PTX and machine code, counted without executing them, against the emulator's count."""
    records = [json.loads(line) for line in run(".counts").splitlines()]  # fails where they differ
    kernels = {record["kernel"]: record["counts"] for record in records}
    assert len(records) == 12 and len(kernels) == 8
    exact = ("product", "matrix load", "barrier", "shuffle", "shared load", "shared store")
    for form in exact:
        executed, text, machine = kernels["scan_backward"][form]
        assert executed == text == machine > 10_000


def test_counts_that_differ_are_named():
    from triton_support.machine.counts import disagreements

    same = {"product": [100, 102, 98], "special": [100, 99, 0], "other": [100, 160, 300]}
    assert not disagreements("scan", same)
    for form, other in (
        ("product", [100, 103, 100]),
        ("product", [100, 100, 97]),
        ("special", [103, 100, 0]),
        ("other", [103, 100, 300]),
    ):
        (found,) = disagreements("scan", same | {form: other})
        assert found.startswith(f"scan: {form}: {other[0]} executed")
    assert not disagreements("coefficients", {"float": [100, 130, 0]})
    for form in ("product", "float"):  # in the page's case, the last of scan's 16 blocks
        assert not disagreements("scan", {form: [100, 106, 106]}, "D 64, counted")
        assert disagreements("scan", {form: [100, 107, 107]}, "D 64, counted")
        assert disagreements("recall", {form: [100, 106, 106]}, "D 64, counted")


@pytest.mark.wide
@pytest.mark.parametrize("case", ["D 64", "D 64, chunk 64", "D 64, packed", "D 128"])
def test_tiles_that_ship(case):
    (record,) = run("", "--cases", case, "--dtypes", "bfloat16").splitlines()
    assert not json.loads(record)["faults"]


def test_the_page_is_made_of_records():
    from triton_support.machine import table

    row = {"case": "D 64", "arch": "sm_80", "triton": "3.9.0", "dtype": "bfloat16", "tile": "64x64"}
    done = row | {"error": 0.0035, "rms": 1.07, "instructions": 11126.0, "products": 672.0}
    done["kernels"] = {"scan_backward": [4828.0, 236.0]}
    done["commit"] = "85bf86d"
    page = table.page([done, row | {"failed": "a | b", "commit": ""}])
    assert "| 64x64 | 3.5e-03 | 1.07 | 11,126 | 672.0 | 85bf86d |" in page
    assert "| D 64 | sm_80 | 3.9.0 | bfloat16 | failed: a / b |" in page
    assert "| scan_backward | 4,828 | 236.0 | 236.0 |" in page  # the last column is the formula's
    form = {"case": "counted", "arch": "sm_80", "triton": "3.9.0"}
    scan = form | {"kernel": "scan", "counts": {"product": [512, 1024, 512], "float": [512, 0, 9]}}
    gates = form | {"kernel": "coefficients", "counts": {"float": [256, 512, 0]}}
    page = table.page([scan, scan, gates])
    assert "| sm_80 | 3.9.0 | product | 2.0 | 4.0 | 2.0 |\n" in page
    assert "| sm_80 | 3.9.0 | float | 2.0 | 0.0 |  |\n" in page
    assert "| sm_80 | 3.9.0 | coefficients | 0.5 | 1.0 |  |\n" in page
    assert table.page(table.recorded()) == table.PAGE.read_text(encoding="utf-8")
