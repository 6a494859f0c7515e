"""The training program: it learns, and goes on exactly as if it had not stopped."""

import csv
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from titans_kernels.models import TitansForCausalLM
from titans_kernels.train import checkpoint
from titans_kernels.train.__main__ import main
from titans_kernels.train.config import Config, load
from titans_kernels.train.loop import Training
from titans_kernels.train.processes import Processes, start

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps that has checkpoints of the second, in a window, and the third."""
    out = tmp_path_factory.mktemp("finished")
    Training(_config(out, steps=3, checkpoint_every=2), ALONE).run()
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_finished_run_goes_on_with_more_steps(run):
    """Only what does not make it another run may change."""
    for changes, message in (
        ({"rows": 4}, "the run there has other rows"),
        ({"model": MODEL | {"window": 32}}, "the run there has other model"),
        ({"pattern": "*.txt"}, "too few files"),
        ({"steps": 2}, "steps: got 2, takes at least 3, which the run in"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            Training(_config(run, **({"steps": 3} | changes)), ALONE)
    training = Training(_config(run, steps=5, log_every=2, keep=1), ALONE)
    assert training.step == 3
    training.run()
    steps = [int(row["step"]) for row in _rows(run / "train.csv")]
    assert steps == [1, 2, 3, 4, 5]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


DAMAGE = {
    "a flipped byte": (_flip, "damaged, it has another checksum"),
    "cut short": (lambda path: os.truncate(path, 100), "damaged, it has another checksum"),
    "a missing file": (Path.unlink, "missing"),
    "an empty folder": (lambda path: _emptied(path.parent), "manifest.json: missing"),
    "a flipped byte of the manifest": (
        lambda path: _flip(path.parent / "manifest.json"),
        "manifest.json: damaged",
    ),
    "another number in the manifest": (
        lambda path: _edit(path.parent / "manifest.json", '"steps": 3', '"steps": 4'),
        "manifest.json: damaged",
    ),
    "a manifest cut short": (
        lambda path: os.truncate(path.parent / "manifest.json", 30),
        "manifest.json: damaged",
    ),
}


def _emptied(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, run):
    change, message = DAMAGE[damage]
    newest, before = sorted((run / "checkpoints").iterdir(), reverse=True)
    (file,) = newest.glob("*.safetensors")
    change(file)
    with pytest.warns(UserWarning, match=f"{newest.name}/.*{message}.*resuming from {before.name}"):
        found, facts = checkpoint.newest(run / "checkpoints")
    assert found == before and facts["step"] == 2
    _emptied(before)
    with pytest.raises(ValueError, match=f"{newest.name}/.*{message}.*no checkpoint is whole"):
        checkpoint.newest(run / "checkpoints")


def test_a_run_goes_on_from_the_checkpoint_before(run, finished):
    shutil.rmtree(run / "checkpoints/step-00000003/")
    (run / "checkpoints/step-00000003").mkdir()
    with (run / "train.csv").open("a") as log:
        log.write("4,1.")  # a row that was being written when the machine stopped
    with pytest.warns(UserWarning, match="step-00000003/manifest.json: missing"):
        training = Training(_config(run, steps=3), ALONE)
    assert training.step == 2
    training.run()
    assert _rows(run / "train.csv") == _rows(finished / "train.csv")
    assert checkpoint.newest(run / "checkpoints")[1]["step"] == 3


def test_a_half_written_checkpoint_is_none(run):
    (run / "checkpoints/step-00000009.partial").mkdir()
    assert Training(_config(run, steps=3), ALONE).step == 3


def test_other_tensors_than_the_checkpoint_holds(run):
    path, _ = checkpoint.newest(run / "checkpoints")
    with pytest.raises(ValueError, match=r"step-00000003: .*Size mismatch"):
        weight = {"model": {"model.norm.weight": torch.zeros(33)}}
        checkpoint.load(path, weight, ALONE)
    with pytest.raises(ValueError, match=r"step-00000003: .*Missing key"):
        checkpoint.load(path, {"other": torch.zeros(3)}, ALONE)


def test_evaluation_by_length(tmp_path):
    training = Training(_config(tmp_path), ALONE)
    found = training.evaluate()
    assert [(row["from"], row["to"]) for row in found] == [(0, 24), (24, 48), (48, 60)]
    assert all(4 < row["bits"] < 12 for row in found)
    assert training.model.training


def _together(out, count, *words):
    """The program on several processes, as torchrun starts them, without torchrun's own."""
    options = [f"{name}={json.dumps(value)}" for name, value in TINY.items()]
    options += [f"model.{name}={value}" for name, value in MODEL.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "titans_kernels.train", *options, *words, f"out={out}"],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_any_number_of_processes_is_the_same_run(tmp_path):
    """Begun on two, gone on with on one, in the middle of a window: what one alone does."""
    words = ["steps=8", "learning_rate=0.02", "evaluate_every=8", "checkpoint_every=6"]
    _together(tmp_path, 2, *words)
    shutil.rmtree(tmp_path / "checkpoints/step-00000008")
    options = {"steps": 8, "learning_rate": 0.02, "evaluate_every": 8, "checkpoint_every": 6}
    training = Training(_config(tmp_path, **options), ALONE)
    assert training.step == 6 and training.cache.get_seq_length() == 2 * 24
    training.run()
    alone = Training(_config(tmp_path / "alone", **options), ALONE)
    alone.run()
    found, want = (_rows(out / "train.csv") for out in (tmp_path, tmp_path / "alone"))
    for got, expected in zip(found, want, strict=True):
        assert got["step"] == expected["step"]
        for name in ("bits", "gradient", "learning_rate"):
            assert float(got[name]) == pytest.approx(float(expected[name]), rel=1e-4), got
    assert float(want[-1]["bits"]) < float(want[0]["bits"]) - 0.5


TNT = MODEL | {"variant": "tnt", "global_chunk": 32, "local_chunks": [8, 4], "reset_every": 16}


def test_a_model_is_trained_on_with_smaller_local_chunks(tmp_path):
    """The second stage of TNT: the same parameters, other chunks."""
    Training(_config(tmp_path / "first", model=TNT), ALONE).run()
    start = str(tmp_path / "first/model")
    smaller = TNT | {"local_chunks": [2, 1]}
    options = {"model": smaller, "start": start, "steps": 24, "evaluate_every": 24}
    training = Training(_config(tmp_path / "second", **options), ALONE)
    saved = TitansForCausalLM.from_pretrained(start)
    saved.set_local_chunks((2, 1))
    assert all(layer.mixer.memory.local_chunks == (2, 1) for layer in saved.model.layers)
    for p, q in zip(training.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(p, q)
    text = training._window(0)[:, : training.config.length + 1]
    bits = saved(text[:, :-1], labels=None).logits
    loss = torch.nn.functional.cross_entropy(bits.flatten(0, 1), text[:, 1:].flatten())
    training.run()
    losses = [float(row["bits"]) for row in _rows(tmp_path / "second/train.csv")]
    assert abs(losses[0] - loss.item() / math.log(2)) < 1e-4
    assert sum(losses[-8:]) < sum(losses[:8])
    trained = TitansForCausalLM.from_pretrained(tmp_path / "second/model")
    assert trained.config.local_chunks == [2, 1]
    assert trained.model.layers[0].mixer.memory.local_chunks == (2, 1)
    again = TitansForCausalLM.from_pretrained(start, local_chunks=[2, 1])  # or by the configuration
    assert again.model.layers[0].mixer.memory.local_chunks == (2, 1)

    other = _config(tmp_path / "third", start=start, model=TNT | {"local_chunks": [8]})
    with pytest.raises(ValueError, match=r"start: .*first/model and `model` do not both have"):
        Training(other, ALONE)


def test_rows_are_divided():
    cpu = torch.device("cpu")
    shares = [Processes(rank, 3, cpu).own_rows(6) for rank in range(3)]
    assert shares == [range(0, 2), range(2, 4), range(4, 6)]
    with pytest.raises(ValueError, match="rows: got 3, takes a multiple of the 2 processes"):
        Processes(0, 2, cpu).own_rows(3)


def test_a_mesh_of_other_size_than_there_are_processes():
    takes = "mesh: got data 1 x length 2 x heads 1, takes a product of 1"
    with pytest.raises(ValueError, match=takes), start("cpu", {"length": 2}):
        pass


def test_text_of_ones_own(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * 5000)
    training = Training(
        _config(tmp_path / "out", data=str(tmp_path), pattern="*.txt", steps=1), ALONE
    )
    assert len(training.files) + len(training.held_out) == 20
    training.run()
    assert (tmp_path / "out/model/model.safetensors").exists()


@pytest.fixture
def words(tmp_path):
    """A tokenizer of three words, and texts of these as JSON lines."""
    vocabulary = {"<eos>": 0, "<unk>": 1, "one": 2, "two": 3, "three": 4}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "words")
    texts = [{"text": "one two three " * 1000}, {"text": "three " * 3000}] * 40
    lines = "".join(f"{json.dumps(text)}\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text(lines)
    return {"tokenizer": str(tmp_path / "words"), "data": str(tmp_path / "texts.jsonl")}


def test_tokens_of_a_tokenizer_from_json_lines(words, tmp_path):
    out = tmp_path / "out"
    training = Training(_config(out, **words, steps=2, tensorboard=True), ALONE)
    assert training.model.config.vocab_size == 5
    found = training.files[0]
    assert found[:4].tolist() in ([2, 3, 4, 2], [4, 4, 4, 4])
    assert set(found.tolist()) == {0, 2, 3, 4}  # ends of texts among them
    training.run()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert tokenizer("three one", add_special_tokens=False)["input_ids"] == [4, 2]
    [events] = (out / "tensorboard").iterdir()
    reader = EventAccumulator(str(events)).Reload()
    logged = [event.value for event in reader.Scalars("train/bits")]
    rows = [float(row["bits"]) for row in _rows(out / "train.csv")]
    assert logged == pytest.approx(rows, rel=1e-5) and len(rows) == 2


def test_tokenizers_and_texts_that_are_none(words, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: got '.*nowhere', takes a tokenizer of"):
        _config(tmp_path, tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"model\.vocab_size: got 4, takes at least 5"):
        _config(tmp_path, **words, model={"vocab_size": 4})
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(ValueError, match=r"data: line 2 of .*wrong\.jsonl is not that"):
        Training(_config(tmp_path / "out", data=str(path)), ALONE)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_configuration_file(tmp_path, suffix):
    path = tmp_path / f"config.{suffix}"
    if suffix == "json":
        path.write_text('{"steps": 5, "model": {"variant": "mal"}}')
    else:
        path.write_text("steps: 5\nmodel:\n  variant: mal\n")
    config = load(
        str(path), ["model.depth=1", "out=here", "rows=3", "clip=2", "learning_rate=3e-3"]
    )
    model = {"variant": "mal", "depth": 1}
    assert config == Config(steps=5, model=model, out="here", rows=3, clip=2, learning_rate=0.003)
    config.save(path)
    assert load(str(path)) == config


REFUSED = {
    "step=5": "step: unknown; did you mean steps?",
    "=5": "'': unknown; there are asynchronous, bf16, checkpoint_every",
    "model.windw=3": "model.windw: unknown; did you mean window?",
    "model.=5": "model.'': unknown",
    "model.window=3.5": "model.window: got 3.5, takes an int",
    "model.variant=mak": "model.variant: got 'mak'",
    "model=3": "model: got 3, takes options",
    "rows": "rows: takes name=value",
    "rows=many": "rows: got 'many', takes an int of at least 1",
    "rows=true": "rows: got True, takes an int of at least 1",
    "rows=0": "rows: got 0, takes an int of at least 1",
    "steps=1e3": "steps: got 1000.0, takes an int of at least 1",
    "learning_rate=.nan": "learning_rate: got nan, takes a finite number above 0",
    "learning_rate=-1": "learning_rate: got -1, takes a finite number above 0",
    "learning_rate=true": "learning_rate: got True, takes a finite number above 0",
    "clip=-1": "clip: got -1, takes a finite number above 0",
    "clip=.inf": "clip: got inf, takes a finite number above 0",
    "weight_decay=-0.1": "weight_decay: got -0.1, takes a finite number of at least 0",
    "seed=-1": "seed: got -1, takes an int of at least 0",
    f"seed={2**70}": f"seed: got {2**70}, takes an int of at least 0 and at most {2**63 - 1}",
    "bf16=1": "bf16: got 1, takes True or False",
    "out=": "out: got None, takes text",
    "mesh.lenght=2": "mesh.lenght: unknown; did you mean length?",
    "mesh.heads=0": "mesh.heads: got 0, takes an int of at least 1",
    "mesh=2": "mesh: got 2, takes data, length and heads by name",
    "device=gpu": "device: got 'gpu', takes 'auto', 'cpu', 'cuda' or 'cuda:N'",
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_mistake_is_refused_by_name(word):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(REFUSED[word])}"):
        load(None, [word])


def test_the_program_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.yaml").write_text("rows: [1")
    for words, message in {
        ("step=5",): "step: unknown; did you mean steps?",
        ("nothing.json",): "No such file",
        (str(tmp_path / "list.json"),): "takes options by name",
        (str(tmp_path / "torn.yaml"),): "torn.yaml: while parsing",
    }.items():
        with pytest.raises(SystemExit):
            main(words)
        assert message in capsys.readouterr().err


def test_limits_are_taken():
    assert load(None, ["weight_decay=0", "seed=0", "data=null"]).weight_decay == 0
    assert load(None, [f"seed={2**63 - 1}"]).seed == 2**63 - 1


def test_files_too_short_for_a_row(tmp_path):
    with pytest.raises(ValueError, match="no file is"):
        Training(_config(tmp_path / "a", length=10**9), ALONE)
    with pytest.raises(ValueError, match="takes one for each process"):
        Training(_config(tmp_path / "a", evaluate_length=10**9), ALONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_here(device):
    with pytest.raises(ValueError, match=f"device: got '{device}'"), start(device):
        pass


@pytest.mark.gpu
def test_a_gpu_without_its_number():
    with start("cuda") as processes:
        assert processes.device == torch.device("cuda", 0)


def test_a_checkpoint_written_in_the_background_is_the_same(tmp_path):
    """Training goes on meanwhile; it is there, with its name, some steps later."""
    out, whole = tmp_path / "background", tmp_path / "whole"
    training = Training(_config(out, steps=20, checkpoint_every=3, asynchronous=True), ALONE)
    training._train_step()
    training._save()
    training._train_step()  # changes the parameters
    assert list((out / "checkpoints").glob("step-????????")) == []
    training._finish_saving()
    once = Training(_config(whole, steps=20, checkpoint_every=3), ALONE)
    once._train_step()
    once._save()
    once._finish_saving()
    (found,), (want,) = (
        (path / "checkpoints/step-00000001").glob("*.safetensors") for path in (out, whole)
    )
    found, want = load_file(found), load_file(want)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], x) for name, x in want.items())
