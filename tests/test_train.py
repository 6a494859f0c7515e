"""The training program: it learns, and goes on exactly as if it had not stopped."""

import csv
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from titans_kernels.models import TitansForCausalLM
from titans_kernels.train import checkpoint
from titans_kernels.train.__main__ import main
from titans_kernels.train.config import Config, load
from titans_kernels.train.loop import Training
from titans_kernels.train.processes import Processes

ROOT = Path(__file__).parent.parent
ALONE = Processes(0, 1, torch.device("cpu"))
TINY = {
    **{"steps": 7, "rows": 2, "length": 24, "pieces": 4, "warmup": 2, "log_every": 1},
    **{"checkpoint_every": 3, "evaluate_every": 3, "evaluate_files": 2, "evaluate_length": 60},
}
MODEL = {
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "window": 16},
    **{"segment": 16, "variant": "mac"},
}


def _config(out, **changes):
    return Config(out=str(out), **(TINY | {"model": MODEL} | changes))


def _rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("variant", ["mac", "lmm"])
def test_a_run_goes_on_exactly(tmp_path, variant):
    model = MODEL | {"variant": variant}
    whole = _config(tmp_path / "whole", model=model)
    Training(whole, ALONE).run()
    cut = _config(tmp_path / "cut", model=model)
    stopped = Training(cut, ALONE)
    stopped.run(until=5)  # past the checkpoint of step 3, in the middle of a window
    again = Training(cut, ALONE)
    assert again.step == 3 and again.cache.get_seq_length() == 3 * 24
    assert len(_rows(tmp_path / "cut/train.csv")) == 3, "what comes again is not there twice"
    again.run()
    for log in ("train.csv", "evaluation.csv"):
        assert _rows(tmp_path / "cut" / log) == _rows(tmp_path / "whole" / log)
    models = (TitansForCausalLM.from_pretrained(tmp_path / n / "model") for n in ("whole", "cut"))
    for expected, got in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(got, expected)

    finished = Training(cut, ALONE)
    assert finished.step == 7
    assert [p.name for p in sorted((tmp_path / "cut/checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000007",
    ]
    with pytest.raises(ValueError, match="the run there has other rows"):
        Training(_config(tmp_path / "cut", model=model, rows=3), ALONE)
    with pytest.raises(FileNotFoundError, match="the run had other processes"):
        checkpoint.load(tmp_path / "cut/checkpoints/step-00000007", replace(ALONE, count=2))


def test_evaluation_by_length(tmp_path):
    training = Training(_config(tmp_path), ALONE)
    found = training.evaluate()
    assert [(row["from"], row["to"]) for row in found] == [(0, 24), (24, 48), (48, 60)]
    assert all(4 < row["bits"] < 12 for row in found)
    assert training.model.training


def test_it_learns_on_two_processes(tmp_path):
    """Gradients are shared, memories are not; and each goes on with its own."""
    words = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]
    words += [f"model.{name}={value}" for name, value in MODEL.items()]
    words += ["steps=8", "learning_rate=0.02", "evaluate_every=8", "checkpoint_every=6"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As torchrun starts them, without torchrun's own process.
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    together |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "titans_kernels.train", *words, f"out={tmp_path}"],
            env=os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    bits = [float(row["bits"]) for row in _rows(tmp_path / "train.csv")]
    assert len(bits) == 8 and bits[-1] < bits[0] - 0.5
    own = [
        torch.load(path, weights_only=True)[0].memory.memory.weights[0]
        for path in sorted((tmp_path / "checkpoints/step-00000006").glob("process-*-of-2.pt"))
    ]
    assert len(own) == 2 and not torch.equal(*own), "both processes read the same text"


def test_text_of_ones_own(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * 5000)
    training = Training(
        _config(tmp_path / "out", data=str(tmp_path), pattern="*.txt", steps=1), ALONE
    )
    assert len(training.files) + len(training.held_out) == 20
    training.run()
    assert (tmp_path / "out/model/model.safetensors").exists()


def test_configurations(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"steps": 5, "model": {"variant": "mal"}}')
    config = load(str(path), ["model.depth=1", "out=here", "rows=3", "clip=2"])
    assert config == Config(
        steps=5, model={"variant": "mal", "depth": 1}, out="here", rows=3, clip=2
    )
    config.save(path)
    assert load(str(path)) == config
    for words, message in {
        "step=5": "step: unknown; there are bf16, checkpoint_every",
        "rows=many": "rows: got 'many', takes a value of type int",
        "rows=0": "rows: got 0, takes an int of at least 1",
        "nothing.json": "No such file",
    }.items():
        with pytest.raises(SystemExit):
            main([words])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="no file is"):
        Training(_config(tmp_path / "a", length=10**9), ALONE)
    with pytest.raises(ValueError, match="takes one for each process"):
        Training(_config(tmp_path / "a", evaluate_length=10**9), ALONE)
