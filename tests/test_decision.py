"""What `backend="auto"` decides: kernels that passed their check run and are remembered."""

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from selfcheck_cases import (
    CHUNK,
    DTYPE,
    HIDDEN,
    D,
    H,
    T,
    configuration_of,
    fresh,
    packed_reading,
    plant,
    scaled,
    small_inputs,
    small_reading,
    watched,
)
from torch.utils import _pytree as pytree

from titans_kernels import neural_memory, retrieve, verify, warmup
from titans_kernels.kernels import operator
from titans_kernels.packing import Options
from titans_kernels.selfcheck import check, decide, records
from titans_kernels.selfcheck.configuration import Configuration

if not triton.knobs.runtime.interpret:
    pytest.skip("needs the interpreter", allow_module_level=True)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    yield from fresh(tmp_path, monkeypatch)


# ------------------------------------------------------------------------------------ sound kernels


def test_sound_kernels_run_and_are_remembered(cache, caplog):
    caplog.set_level(logging.INFO, "titans_kernels")
    with watched() as ran:
        first = retrieve(**small_reading())
    assert ran == ["triton"] and "retrieve, float32, D 16" in caplog.text
    assert "triton, which has passed its check now" in caplog.text
    (record,) = cache.glob("*")
    assert json.loads(record.read_text())["passed"]["head_dim"] == D

    decide.forget()
    with watched() as ran, mock.patch.object(decide, "check", side_effect=AssertionError):
        again = retrieve(**small_reading())
    assert ran == ["triton"] and "passed its check before" in caplog.text
    assert torch.equal(first, again)
    assert torch.equal(first, retrieve(**small_reading(), backend="triton"))


def test_training_runs_what_was_checked(cache):
    x = small_inputs(requires_grad=True, T=12)
    leaves = pytree.tree_leaves(x)

    def trained(backend):
        o, _ = neural_memory(**x, chunk_size=CHUNK, backend=backend)
        return o.detach(), *torch.autograd.grad(o.square().sum(), leaves)

    with mock.patch.object(decide, "check", wraps=decide.check) as checked:
        got = trained("auto")
    assert [call.args[0].gradients for call in checked.call_args_list] == [True]
    assert all(map(torch.equal, got, trained("triton")))
    assert len(list(cache.iterdir())) == 1


# ------------------------------------------------------------------------------------ wrong kernels


def test_wrong_kernels_are_warned_of_once_and_never_used(monkeypatch, cache, caplog):
    caplog.set_level(logging.INFO, "titans_kernels")
    plant(monkeypatch, operator.launch, "recall", scaled)
    with watched() as ran:
        with pytest.warns(RuntimeWarning, match=r"failed their check.*o has an error of .*bound"):
            got = retrieve(**small_reading())
        assert torch.equal(got, retrieve(**small_reading()))  # a second warning would be an error
    assert ran == ["torch", "torch"] and not cache.exists()
    assert "torch, as Triton has failed its check" in caplog.text
    assert torch.equal(got, retrieve(**small_reading(), backend="torch"))


def test_training_goes_on_without_wrong_kernels(monkeypatch):
    """Forward keeps nothing that backward could use: the PyTorch backend computes it again."""
    monkeypatch.setattr(decide, "check", lambda *_: check.Failure("o", 1.0, 0.1))
    x = small_inputs(requires_grad=True, T=700)  # longer than what a state is kept for
    leaves = pytree.tree_leaves(x)

    def trained(backend):
        o, state = neural_memory(**x, backend=backend, output_final_state=True)
        loss = o.square().sum() + state.momentum[0].square().sum()
        return o.detach(), *torch.autograd.grad(loss, leaves)

    with pytest.warns(RuntimeWarning, match="o has an error of 1.0e"):
        got = trained("auto")
    assert all(map(torch.equal, got, trained("torch")))


def test_kernels_that_do_not_compile_are_not_used(monkeypatch):
    monkeypatch.setattr(operator.launch, "recall", mock.Mock(side_effect=OSError("no compiler")))
    with watched() as ran, pytest.warns(RuntimeWarning, match="OSError: no compiler"):
        retrieve(**small_reading())
    assert ran == ["torch"]


# ------------------------------------------------------------------------------------ records


OTHERS = {"device": "another GPU", "torch": "2.0", "triton": "3.5", "kernels": "0", "tokens": 32}


@pytest.mark.parametrize("field", OTHERS)
def test_a_record_of_another_version_is_not_trusted(field):
    ours = Configuration.of_reading(packed_reading(), Options("gelu_tanh", True), T)
    other = ours._replace(**{field: OTHERS[field] if field != "tokens" else 2 * ours.tokens})
    records.write(other)
    assert records.read(other) and not records.read(ours)
    os.replace(records.path(other), records.path(ours))  # copied under the name of ours
    assert not records.read(ours)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"passed": true}'])
def test_a_damaged_record_is_not_trusted(text):
    ours = configuration_of()
    records.write(ours)
    records.path(ours).write_text(text)
    assert not records.read(ours)
    records.write(ours)
    assert records.read(ours)


def test_the_hash_is_of_the_sources(monkeypatch, tmp_path):
    from titans_kernels.selfcheck import configuration

    before = configuration._hash()
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "scan.py").write_text("x = 1\n")
    monkeypatch.setattr(configuration, "KERNELS", kernels)
    hashes = [before]
    for text in ("x = 1\n", "x = 2\n"):
        (kernels / "scan.py").write_text(text)
        configuration._hash.cache_clear()
        hashes.append(configuration._hash())
    configuration._hash.cache_clear()
    assert len(set(hashes)) == 3


def test_a_folder_that_takes_no_file_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with mock.patch.object(decide, "check", return_value=None) as checked:
        monkeypatch.setenv("TITANS_KERNELS_CACHE", str(tmp_path / "file" / "below"))
        for _ in range(2):
            decide.forget()
            retrieve(**small_reading())
        assert checked.call_count == 2

        monkeypatch.setenv("TITANS_KERNELS_CACHE", str(tmp_path / "full"))
        monkeypatch.setattr(records.os, "replace", mock.Mock(side_effect=PermissionError))
        decide.forget()
        retrieve(**small_reading())
        assert checked.call_count == 3 and not list((tmp_path / "full").iterdir())


def test_where_records_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("TITANS_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(records.sys, "platform", "linux")
    assert records.folder() == tmp_path / "titans_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert records.folder() == tmp_path / ".cache" / "titans_kernels"


PROCESS = """
import logging
import torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from titans_kernels import retrieve
weights = torch.ones(1, 16, 16) / 16, torch.ones(1, 16, 16) / 16
print(retrieve(torch.ones(1, 3, 1, 16), weights).sum().item())
"""


def test_two_processes_at_once(cache):
    command = [sys.executable, "-c", PROCESS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    (record,) = cache.iterdir()
    assert json.loads(record.read_text())["passed"]["operator"] == "retrieve"
    assert all("triton, which has passed its check" in log for _, log in outputs)


# --------------------------------------------------------------------------------- entry points


@pytest.mark.parametrize("value, ran", [("torch", "torch"), ("triton", "triton")])
def test_the_variable_says_what_auto_is(monkeypatch, value, ran):
    monkeypatch.setenv("TITANS_KERNELS_AUTO", value)
    monkeypatch.setattr(decide, "check", mock.Mock(side_effect=AssertionError))
    with watched() as names:
        retrieve(**small_reading())
    assert names == [ran]


def test_another_value_of_the_variable_is_refused(monkeypatch):
    monkeypatch.setenv("TITANS_KERNELS_AUTO", "yes")
    message = "TITANS_KERNELS_AUTO: got 'yes', takes one of 'check', 'triton', 'torch'"
    with pytest.raises(ValueError, match=message):
        retrieve(**small_reading())


@pytest.mark.parametrize("case", ["six layers", "no interpreter"])
def test_what_triton_does_not_cover_is_pytorch_at_once(monkeypatch, case):
    monkeypatch.setattr(decide, "check", mock.Mock(side_effect=AssertionError))
    if case == "no interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    with watched() as ran:
        retrieve(**small_reading(depth=6 if case == "six layers" else 2))
    assert set(ran) == {"torch"}


@pytest.mark.parametrize("read", ["token", "chunk"])
def test_what_queries_read_is_a_configuration_of_its_own(cache, read):
    with mock.patch.object(decide, "check", wraps=decide.check) as checked:
        neural_memory(**small_inputs(), read=read, backend="auto")
    assert [call.args[0].read for call in checked.call_args_list] == [read]


def test_threads_check_once():
    with (
        mock.patch.object(decide, "check", return_value=None) as checked,
        ThreadPoolExecutor(4) as pool,
    ):
        outputs = list(pool.map(lambda _: retrieve(**small_reading()), range(4)))
    assert checked.call_count == 1 and all(torch.equal(outputs[0], o) for o in outputs)


def test_a_graph_is_not_captured_undecided(monkeypatch):
    ours = Configuration.of_reading(packed_reading(), Options("gelu_tanh", True), T)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(decide, "check", mock.Mock(side_effect=AssertionError))
    with pytest.raises(RuntimeError, match=r"backend: got 'auto' inside the capture.*warmup"):
        decide._backend(ours, H, torch.device("cuda"))
    records.write(ours)  # what was decided before, by this process or another, may be captured
    assert decide._backend(ours, H, torch.device("cuda")) == "triton"


def test_compiled_code_decides_outside_the_graph(cache):
    """One graph for all lengths; each length's kernels are checked when it first runs."""
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    read = torch.compile(retrieve, backend=count, fullgraph=True, dynamic=True)
    x = small_reading()
    with mock.patch.object(decide, "check", wraps=decide.check) as checked, watched() as ran:
        for length in (5, 16, 20):
            part = x | {"q": x["q"][:, :length]}
            assert torch.equal(read(**part), retrieve(**part, backend="triton"))
    assert len(graphs) == 1 and checked.call_count == 2 and set(ran) == {"triton"}


def test_second_derivatives_and_transforms_take_pytorch(monkeypatch):
    monkeypatch.setattr(decide, "check", lambda *_: None)
    x = small_reading()
    q = x.pop("q").double().requires_grad_()
    x = {name: tuple(part.double() for part in parts) for name, parts in x.items()}

    def twice(backend):
        (dq,) = torch.autograd.grad(
            retrieve(q, **x, backend=backend).square().sum(), q, create_graph=True
        )
        return torch.autograd.grad(dq.square().sum(), q)[0]

    torch.testing.assert_close(twice("auto"), twice("torch"))
    _, tangent = torch.func.jvp(lambda q: retrieve(q, **x), (q,), (q,))
    _, want = torch.func.jvp(lambda q: retrieve(q, **x, backend="torch"), (q,), (q,))
    torch.testing.assert_close(tangent, want)


def _verified(monkeypatch, capsys):
    """`python -m titans_kernels.verify`, its own table of one row, its warming up of one call."""
    monkeypatch.setattr(verify, "run_checks", lambda *_, **__: [mock.Mock(covered=True, ok=True)])
    monkeypatch.setattr(verify, "SHORT_DTYPES", (DTYPE,))
    monkeypatch.setattr(verify, "warmup", lambda *_, **__: retrieve(**small_reading()))
    code = verify.main(["--device", "cpu", "--backend", "triton", "--head-dim", str(D)])
    return code, capsys.readouterr().out


def test_verify_checks_ahead(monkeypatch, capsys, cache):
    code, out = _verified(monkeypatch, capsys)
    assert code == 0 and "triton, which has passed its check now" in out
    assert len(list(cache.iterdir())) == 1


def test_verify_fails_where_auto_would_be_pytorch(monkeypatch, capsys):
    plant(monkeypatch, operator.launch, "recall", scaled)
    code, out = _verified(monkeypatch, capsys)
    assert code == 1 and "FAIL: titans_kernels: the Triton kernels failed their check" in out


def test_warmup_checks_ahead(cache, device):
    warmup(H, D, hidden=HIDDEN, chunk_size=CHUNK, dtype=DTYPE, lengths=(1,), device=device)
    written = {json.loads(path.read_text())["passed"]["operator"] for path in cache.iterdir()}
    assert written == {"neural_memory", "retrieve"}
    decide.forget()
    with mock.patch.object(decide, "check", side_effect=AssertionError):
        retrieve(**small_reading() | {"q": small_reading()["q"][:, :1]})
