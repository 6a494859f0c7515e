"""Every example runs, at a small size, and does what it is there to show."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from titans_kernels.models import TitansForCausalLM

FOLDER = Path(__file__).parents[1] / "examples"


def _main(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """What train_from_scratch.py writes, and its losses."""
    out = tmp_path_factory.mktemp("model")
    small = ("--width", 32, "--layers", 2, "--length", 32, "--steps", 20)
    return out, _main("train_from_scratch", "--out", out, *small)


def test_train_from_scratch(model):
    _, losses = model
    assert losses[0] == pytest.approx(math.log(256), rel=0.1)
    assert losses[-1] < 0.75 * losses[0]


def test_keep_a_memory(model, tmp_path, capfd):
    """The memory goes through a file: what follows is what follows in one call."""
    folder, _ = model
    book, file = tmp_path / "book.txt", tmp_path / "memory.pt"
    book.write_text("All that the memory has read. " * 10)
    _main("keep_a_memory", folder, "--read", book, "--memory", file, "--length", 100)
    assert "300 bytes read" in capfd.readouterr().out
    written = _main("keep_a_memory", folder, "--memory", file, "--prompt", "All", "--more", 5)
    whole = torch.tensor([list(book.read_bytes() + b"All")])
    at_once = TitansForCausalLM.from_pretrained(folder).eval().generate(whole, max_new_tokens=5)
    assert written[0, -5:].tolist() == at_once[0, -5:].tolist()
    small = file.stat().st_size
    book.write_text("All that the memory has read. " * 40)
    _main("keep_a_memory", folder, "--read", book, "--memory", file, "--length", 100)
    assert file.stat().st_size == small


def test_finetune_llama(tmp_path):
    small = ("--out", tmp_path, "--length", 16, "--steps", 12)
    names, log, same = _main("finetune_llama", *small)
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(names) == 4 and same and float(losses[-1]) < 0.9 * float(losses[0])


def test_custom_layer():
    assert _main("custom_layer", "--steps", 60) > 0.5


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 80
