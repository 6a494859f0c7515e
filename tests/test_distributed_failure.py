"""A process that is killed or hangs ends the others, by name, and the run goes on with fewer."""

import json
import os
import runpy
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import process_group
import pytest
import torch
from checks_training import MODEL, RUN

from titans_kernels.distributed import lost
from titans_kernels.train.config import Config
from titans_kernels.train.loop import Training
from titans_kernels.train.processes import Processes, start

LONG = RUN | {"steps": 100_000, "checkpoint_every": 3, "evaluate_every": 100_000}
WAIT = 120  # seconds that nothing takes, unless it hangs


@contextmanager
def _two(folder, function, *args):
    """Two processes, with the environment of torchrun, that call a function of (rank, *args)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [process_group.start(_begin, r, port, folder, function, args) for r in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _begin(rank, port, folder, function, args):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
    torch.set_num_threads(1)
    said = os.open(Path(folder, f"{rank}.err"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 2)
    function(rank, folder, *args)


def _errors(folder, process, rank):
    process.join(WAIT)
    assert process.exitcode == 1
    return Path(folder, f"{rank}.err").read_text()


def _until(found, processes):
    until = time.monotonic() + WAIT
    while not found():
        assert all(process.is_alive() for process in processes)
        assert time.monotonic() < until
        time.sleep(0.05)


def _train(rank, folder, words):
    sys.argv = ["titans_kernels.train", *words]
    runpy.run_module("titans_kernels.train", run_name="__main__")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on_with_fewer(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(16):
        (tmp_path / f"text/{i}.txt").write_bytes(bytes([65 + i, 32]) * 3000)
    given = LONG | {"data": str(tmp_path / "text"), "out": str(tmp_path / "run")}
    words = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    words += [f"model.{name}={value}" for name, value in MODEL.items()] + ["mesh.length=2"]
    checkpoints = tmp_path / "run/checkpoints"
    with _two(tmp_path, _train, words) as (first, other):
        _until((checkpoints / "step-00000006/manifest.json").exists, (first, other))
        other.kill()
        errors = _errors(tmp_path, first, 0)
    assert "RuntimeError: rank 1 of 2 is lost: no sign of life" in errors

    step = int(max(checkpoints.glob("step-????????")).name.removeprefix("step-"))
    alone = Processes(0, 1, torch.device("cpu"))
    training = Training(Config(**(given | {"model": MODEL})), alone)
    assert training.step == step >= 6
    training.run(step + 1)
    assert training.step == step + 1


def _hang(rank, folder):
    lost.EVERY, lost.PATIENCE = 0.1, 0.5
    Path(folder, f"{rank}.here").touch()
    while not Path(folder, f"{1 - rank}.here").exists():
        time.sleep(0.01)
    with start("cpu", {"length": 2}, timeout=5) as processes:
        processes.wait()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        processes.wait()


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others(tmp_path):
    with _two(tmp_path, _hang) as (_, other):
        errors = _errors(tmp_path, other, 1)
    assert "RuntimeError: rank 0 of 2 is lost: it keeps the store, which does not respond" in errors
