"""Files are for ever, and are data: what an earlier version wrote is read, and nothing in it runs.

`python tests/test_files.py FOLDER` writes the files of this version, a training checkpoint too.
Those in tests/written/ are never written again: a version that cannot read them breaks what users
have on their disks.
"""

import ast
import contextlib
import csv
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree

from titans_kernels import (
    MemoryState,
    NeuralMemory,
    load_session,
    neural_memory,
    retrieve,
    save_session,
)

ROOT = Path(__file__).parents[1]
WRITTEN = ROOT / "tests" / "written"
VERSIONS = sorted(path.name for path in WRITTEN.iterdir()) if WRITTEN.exists() else []
LAYER = {"heads": 2, "expansion": 2, "chunk_size": 4, "dtype": torch.float64}


def _randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _sizes():
    return make_inputs(2, 7, 2, 4, 6, 2, requires_grad=False)


def _operator_goes_on(state):
    """Output of tokens after the state, and of a reader of it."""
    inputs = _sizes()
    o, _ = neural_memory(**inputs, chunk_size=4, initial_state=state)
    return o, retrieve(inputs["q"], state, norm=inputs["norm"])


def _model():
    from titans_kernels.models import TitansConfig, TitansForCausalLM

    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2}
    small = {"segment": 4, "chunk_size": 4, "expansion": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    return TitansForCausalLM(TitansConfig(**sizes, **small)).double().eval()


TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def write(folder):
    """The files of this version, and what a reader must make of them."""
    folder.mkdir(parents=True)
    _, state = neural_memory(**_sizes(), chunk_size=4, output_final_state=True)
    torch.save(state, folder / "state.pt")
    torch.manual_seed(0)
    layer, x = NeuralMemory(6, dim_head=4, **LAYER), _randn(2, 7, 6)
    out, after = layer(x)
    torch.save(layer.state_dict(), folder / "layer.pt")
    save_session(after, folder / "session.pt")
    model = _model()
    model.save_pretrained(folder / "model")
    results = {
        "operator": _operator_goes_on(state),
        "layer": out,
        "layer goes on": layer(x, after)[0],
        "model": model(TOKENS).logits,
    }
    torch.save(pytree.tree_map(torch.Tensor.detach, results), folder / "results.pt")


RUN = {
    **{"out": "run", "data": "text", "pattern": "*.txt", "rows": 2, "length": 12, "pieces": 4},
    **{"steps": 5, "warmup": 2, "log_every": 1, "checkpoint_every": 3, "keep": 9},
    **{"evaluate_every": 9, "evaluate_files": 1, "evaluate_length": 24, "device": "cpu"},
    "model": {
        **{"hidden_size": 8, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 8},
        **{"variant": "mac", "segment": 4, "chunk_size": 5},
    },
}


def _trained(steps):
    """The run in this folder, taken to the end; what it did then."""
    from titans_kernels.train.config import Config
    from titans_kernels.train.loop import Training
    from titans_kernels.train.processes import Processes

    Path("text").mkdir(exist_ok=True)
    for i in range(12):
        Path(f"text/{i}.txt").write_bytes(bytes(97 + i * j % 23 for j in range(5000)))
    training = Training(Config(**RUN), Processes(0, 1, torch.device("cpu")))
    assert training.step == 5 - steps
    training.run()
    with open("run/train.csv", newline="") as file:
        done = list(csv.DictReader(file))[-steps:]
    parameters = [p.detach() for p in training.model.parameters()]
    return [[float(row["bits"]), float(row["gradient"])] for row in done], parameters


def write_training(folder):
    """A checkpoint in the middle of a window of text, and the two steps after it."""
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        done, parameters = _trained(5)
        shutil.copytree("run/checkpoints/step-00000003", folder / "step-00000003")
    torch.save({"rows": torch.tensor(done[-2:]), "parameters": parameters}, folder / "results.pt")


@pytest.fixture(params=VERSIONS)
def written(request):
    folder = WRITTEN / request.param
    return folder, torch.load(folder / "results.pt", weights_only=True)


def _close(got, want):
    for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(x, y, atol=1e-11, rtol=1e-11)


def test_there_is_a_version_to_read():
    assert "0.1.0" in VERSIONS


def test_a_written_state_goes_on(written):
    folder, results = written
    state = torch.load(folder / "state.pt", weights_only=True)
    assert isinstance(state, MemoryState)
    _close(_operator_goes_on(state), results["operator"])


def test_a_written_layer_and_its_session(written):
    folder, results = written
    layer, x = NeuralMemory(6, dim_head=4, **LAYER), _randn(2, 7, 6)
    layer.load_state_dict(torch.load(folder / "layer.pt", weights_only=True))
    _close(layer(x)[0], results["layer"])
    _close(layer(x, load_session(folder / "session.pt"))[0], results["layer goes on"])


def test_a_written_model(written):
    folder, results = written
    models = pytest.importorskip("titans_kernels.models")
    model = models.TitansForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    _close(model.eval()(TOKENS).logits, results["model"])


@pytest.mark.parametrize("lacks", ["", "clip"], ids=["", "an option that is new"])
def test_a_written_run_goes_on(written, lacks, tmp_path, monkeypatch):
    """Parameters, what the optimizer holds and memories: it has read a part of a window."""
    from titans_kernels.train import checkpoint

    folder = written[0] / "training"
    step = shutil.copytree(folder / "step-00000003", tmp_path / "run/checkpoints/step-00000003")
    if lacks:
        facts = checkpoint.read_manifest(step)
        del facts["config"][lacks]
        checkpoint._write_manifest(step / checkpoint.MANIFEST, facts)
    monkeypatch.chdir(tmp_path)
    done, parameters = _trained(2)
    results = torch.load(folder / "results.pt", weights_only=True)
    torch.testing.assert_close(torch.tensor(done), results["rows"], rtol=1e-4, atol=0)
    for got, want in zip(parameters, results["parameters"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------- nothing in them runs


class Planted:
    """Whoever unpickles it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def _checkpoint(folder):
    """Planted in all that torch.distributed.checkpoint reads, with checksums that fit."""
    from titans_kernels.train import checkpoint
    from titans_kernels.train.processes import Processes

    step, data = folder / "step-00000001", (folder / "planted.pt").read_bytes()
    step.mkdir()
    for name in (".metadata", "__0_0.distcp", "shard-00001-model-00001-of-00001.safetensors"):
        (step / name).write_bytes(data)
    files = {path.name: hashlib.sha256(data).hexdigest() for path in step.iterdir()}
    checkpoint._write_manifest(step / "manifest.json", {"step": 1, "files": files})
    found, _ = checkpoint.newest(folder)
    return checkpoint.load(found, {"x": torch.ones(1)}, Processes(0, 1, torch.device("cpu")))


def _weights_of_a_model(folder):
    models = pytest.importorskip("titans_kernels.models")
    _model().config.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes((folder / "planted.pt").read_bytes())
    return models.TitansForCausalLM.from_pretrained(folder)


READERS = {
    "session": lambda folder: load_session(folder / "planted.pt"),
    "checkpoint": _checkpoint,
    "model": _weights_of_a_model,
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", ["torch.save", "pickle"])
def test_a_planted_pickle_is_not_run(read, kind, tmp_path):
    marker, file = tmp_path / "ran", tmp_path / "planted.pt"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Planted(marker), protocol=2))
    else:
        torch.save({"step": Planted(marker)}, file)
    with pytest.raises(Exception) as caught:
        read(tmp_path)
    assert not isinstance(caught.value, FileNotFoundError) and not marker.exists()
    with contextlib.suppress(RuntimeError):  # a pickle alone is no file of torch's, but it has run
        torch.load(file, weights_only=False)
    assert marker.exists()


# ------------------------------------------------------------------------------------- the sources

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "code", "codeop"}
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "ftplib", "smtplib", "xmlrpc"}


def _runs_data(source):
    """Lines that run what is not in the source, read more than data, or go to the network."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [(node.lineno, x) for x in names if x.split(".")[0] in MODULES | NETWORK]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append((node.lineno, called))
        if called in ("torch.load", "np.load", "numpy.load"):
            safe = {"torch.load": "weights_only=True"}.get(called, "allow_pickle=False")
            if safe not in [ast.unparse(k) for k in node.keywords]:
                found.append((node.lineno, called))
        if any(k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords):
            found.append((node.lineno, "shell"))
    return sorted(found)


@pytest.mark.parametrize("package", ["titans_kernels", "reference"])
def test_the_package_runs_no_data(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not _runs_data(path.read_text(encoding="utf-8")), path


def test_what_runs_data_is_found():
    lines = ["import pickle", "from urllib.request import urlopen", "eval(x)", "exec(x)"]
    lines += ["torch.load(f)", "torch.load(f, weights_only=False)", "run(x, shell=True)"]
    lines += ["__import__(x)", "np.load(f, allow_pickle=True)", "import a, socket"]
    sound = ["model.eval()", "torch.compile(f)", "torch.load(f, weights_only=True)", "import a"]
    assert [line for line, _ in _runs_data("\n".join(lines + sound))] == [*range(1, 11)]


def test_nothing_goes_to_the_network(tmp_path):
    """Every module is imported, a model made, saved and loaded: no socket is opened."""
    code = """
import importlib, pkgutil, sys
import torch

def watch(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        sys.__stderr__.write(f"{event} {arguments}\\n")
        raise SystemError(event)

sys.addaudithook(watch)
import titans_kernels
for module in pkgutil.walk_packages(titans_kernels.__path__, "titans_kernels."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from test_files import TOKENS, _model, write
from pathlib import Path
write(Path(sys.argv[1]) / "files")
model = type(_model()).from_pretrained(Path(sys.argv[1]) / "files" / "model")
model.generate(TOKENS, max_new_tokens=2, do_sample=False)
"""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    write(Path(sys.argv[1]).absolute())
    write_training(Path(sys.argv[1]).absolute() / "training")
