"""A process that is killed or hangs ends the others, by name, and the run goes on with fewer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checks_training import MODEL, RUN

from titans_kernels.train.config import Config
from titans_kernels.train.loop import Training
from titans_kernels.train.processes import Processes

ROOT = Path(__file__).parent.parent
TIMEOUT = 20  # seconds, after which a process that hangs is lost; one that is killed is at once
LONG = RUN | {"steps": 100_000, "checkpoint_every": 3, "evaluate_every": 100_000}


def _started(out, text, count, *words):
    options = [f"{n}={json.dumps(v)}" for n, v in (LONG | {"data": str(text)}).items()]
    options += [f"model.{name}={value}" for name, value in MODEL.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "titans_kernels.train", *options, *words, f"out={out}"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how, lost, words",
    [
        (signal.SIGKILL, 1, "rank 1 of 2 is lost: no sign of life"),
        (signal.SIGSTOP, 0, "rank 0 of 2 is lost: it keeps the store, which does not respond"),
    ],
    ids=["killed", "hangs"],
)
def test_a_lost_process_ends_the_others_and_the_run_goes_on_with_fewer(tmp_path, how, lost, words):
    (tmp_path / "text").mkdir()
    for i in range(16):
        (tmp_path / f"text/{i}.txt").write_bytes(bytes([65 + i, 32]) * 3000)
    out = tmp_path / "run"
    left = 1 - lost
    processes = _started(out, tmp_path / "text", 2, "mesh.length=2", f"timeout={TIMEOUT}")
    try:
        until = time.monotonic() + 120
        while not (out / "checkpoints/step-00000006/manifest.json").exists():
            assert all(p.poll() is None for p in processes), processes[0].stderr.read()
            assert time.monotonic() < until
            time.sleep(0.1)
        processes[lost].send_signal(how)
        _, errors = processes[left].communicate(timeout=TIMEOUT + 60)
    finally:
        for process in processes:
            process.kill()
    assert processes[left].returncode == 1
    assert f"RuntimeError: {words}" in errors

    found = sorted(path.name for path in (out / "checkpoints").glob("step-????????"))
    step = int(found[-1].removeprefix("step-"))
    changed = {"out": str(out), "data": str(tmp_path / "text"), "model": MODEL}
    alone = Processes(0, 1, torch.device("cpu"))
    training = Training(Config(**(LONG | changed | {"mesh": {}})), alone)
    assert training.step == step >= 6
    training.run(step + 1)
    assert training.step == step + 1
