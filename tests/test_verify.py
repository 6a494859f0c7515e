"""`python -m titans_kernels.verify` says ok when all is well, and only then."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from titans_kernels import verify


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def _verdicts(text):
    """The last column of every row of the table."""
    rows = re.findall(r"^(?:neural_memory|retrieve) .*$", text, re.MULTILINE)
    return [row.rsplit(maxsplit=1)[-1] for row in rows]


def test_everything_is_ok(capsys):
    assert verify.main(["--quick", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert _verdicts(out) == ["ok"] * len(verify.CASES) * len(verify.DTYPES)
    assert out.endswith("comparisons with the float64 reference: all ok\n")


def _scaled_output(operator):
    def broken(*args, **kwargs):
        o, state = operator(*args, **kwargs)
        return o * 1.003, state

    return broken


def _scaled_momentum(operator):
    def broken(*args, **kwargs):
        o, state = operator(*args, **kwargs)
        return o, replace(state, momentum=tuple(s * 1.003 for s in state.momentum))

    return broken


def _scaled_gradient(operator):
    def broken(*args, eta, **kwargs):
        return operator(*args, eta=eta + 0.003 * (eta - eta.detach()), **kwargs)

    return broken


def _nan(operator):
    def broken(*args, **kwargs):
        o, state = operator(*args, **kwargs)
        return o + math.nan, state

    return broken


def _raises(operator):
    def broken(*args, **kwargs):
        raise RuntimeError("planted fault\nsecond line")

    return broken


def _nothing_learned(operator):
    def broken(*args, **kwargs):
        o, state = operator(*args, **kwargs)
        return o.detach(), state

    return broken


FAULTS = {
    "output": _scaled_output,
    "final state": _scaled_momentum,
    "gradient": _scaled_gradient,
    "nan": _nan,
    "raises": _raises,
    "detached": _nothing_learned,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_broken_operator_fails(monkeypatch, capsys, fault, dtype):
    monkeypatch.setattr(verify, "DTYPES", (dtype,))
    monkeypatch.setattr(verify, "CASES", verify.CASES[2:3])
    monkeypatch.setattr(verify, "neural_memory", fault(verify.neural_memory))
    assert verify.main(["--quick", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out
    assert out.endswith("1 comparisons with the float64 reference: 1 FAIL\n")


def test_one_fault_spoils_only_its_rows(monkeypatch):
    monkeypatch.setattr(verify, "CASES", (verify.CASES[0], verify.CASES[5]))
    monkeypatch.setattr(verify, "neural_memory", _raises(None))
    memory, read = verify.run_checks(dtypes=[torch.float64], length=verify.QUICK_LENGTH)
    assert (memory.ok, memory.problem) == (False, "RuntimeError: planted fault")
    assert read.ok and read.state is None and read.output is not None


def test_a_backend_that_covers_nothing_is_not_ok(monkeypatch, capsys):
    def uncovered(*args, **kwargs):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(verify, "CASES", verify.CASES[:1])
    monkeypatch.setattr(verify, "neural_memory", uncovered)
    assert verify.main(["--quick", "--device", "cpu", "--backend", "triton"]) == 1
    out = capsys.readouterr().out
    assert out.count("not covered: no such kernel") == len(verify.DTYPES)
    assert "nothing was compared" in out
    # PyTorch has no excuse.
    assert verify.main(["--quick", "--device", "cpu", "--backend", "torch"]) == 1


def test_worst_error_is_the_worst():
    ones = torch.ones(4, dtype=torch.float64)
    wanted = {"a": ones, "b": ones, "zero": 0 * ones}
    assert verify.worst_error({"a": ones, "b": 1.5 * ones, "zero": 0 * ones}, wanted) == (0.5, "b")
    assert verify.worst_error({"a": ones, "b": ones, "zero": ones}, wanted) == (math.inf, "zero")
    nan = verify.worst_error({"a": ones * math.nan, "b": ones, "zero": 0 * ones}, wanted)
    assert nan == (math.inf, "a")
    assert verify.worst_error({}, {}) is None


def test_environment_is_one_line(capsys):
    assert verify.main(["--env", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for word in ("titans_kernels", "Python", f"torch {torch.__version__}", "triton", "CPU"):
        assert word in out


@pytest.mark.parametrize("argument", [["--device", "nowhere"], ["--backend", "cuda"], ["--fast"]])
def test_wrong_arguments_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as exit_info:
        verify.main(argument)
    assert exit_info.value.code == 2
    assert argument[-1] in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_compares_sharded_layers_with_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "titans_kernels.verify", "--device", "cpu", "--backend", "torch"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split()[:5] for line in done.stdout.splitlines() if line.endswith(" ok")]
    layers = ("NeuralMemory", "TitansMAC", "TitansMAG", "TitansMAL", "TitansTNT")
    ranks = (["2", "heads", "x", "1"], ["1", "heads", "x", "2"])
    assert rows[:-1] == [[name, *where] for where in ranks for name in layers for _ in range(3)]
    assert "30 comparisons with one process: all ok" in done.stdout
