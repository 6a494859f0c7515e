"""What tests of the self-check share: a small memory, a fresh process, wrong kernels, what ran."""

from contextlib import contextmanager
from unittest import mock

import torch
from inputs import make_inputs
from torch.utils import _pytree as pytree

from titans_kernels import ops
from titans_kernels.kernels import operator
from titans_kernels.kernels.tiles import Tile
from titans_kernels.packing import Options, Reading
from titans_kernels.selfcheck import check, decide
from titans_kernels.selfcheck.configuration import Configuration

T, H, D, HIDDEN, CHUNK = 20, 1, 16, 16, 5
DTYPE = torch.float32


def fresh(tmp_path, monkeypatch):
    """A process that has decided nothing, small tiles and problems, an empty cache folder."""
    monkeypatch.setenv("TITANS_KERNELS_AUTO", "check")
    monkeypatch.setenv("TITANS_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(check, "GATES", 1)
    monkeypatch.setattr(operator, "tile", lambda *_: Tile(16, 16))
    decide.forget()
    yield tmp_path / "cache"
    decide.forget()


def small_inputs(dtype=DTYPE, requires_grad=False, **sizes):
    sizes = {"B": 1, "T": T, "H": H, "D": D, "hidden": HIDDEN, "depth": 2} | sizes
    return make_inputs(**sizes, dtype=dtype, requires_grad=requires_grad)


def small_reading(dtype=DTYPE, depth=2):
    """What `retrieve` makes of the inputs: cheap to check, in the interpreter too."""
    x = small_inputs(dtype, depth=depth)
    return {"q": x["q"], "weights_or_state": x["weights"], "norm": x["norm"]}


@contextmanager
def watched():
    """Which backends compute meanwhile, check and judge left out."""
    ran, module = [], ops._module

    def watched(backend):
        ran.append(backend)
        return module(backend)

    with mock.patch.object(ops, "_module", watched):
        yield ran


def configuration_of(dtype=DTYPE, **changes):
    """That of `small_inputs` in training."""
    read = Configuration.of_reading(packed_reading(dtype), Options("gelu_tanh", True), 16)
    gates = ",".join(["float32"] * 3)
    memory = {"operator": "neural_memory", "gates": gates, "chunk_size": CHUNK, "tokens": 16}
    return read._replace(**memory | changes)


def packed_reading(dtype=DTYPE):
    x = small_inputs(dtype)
    weights, norm = [w[None] for w in x["weights"]], torch.stack(x["norm"], 1)
    return Reading(x["q"][0], weights, norm, torch.tensor([0, T]))


def plant(monkeypatch, owner, name, change, **when):
    """Change the first tensor that a launcher writes, each time it is called with `when`."""
    launcher = getattr(owner, name)

    def wrong(*args, **kwargs):
        if when.items() - kwargs.items():
            return launcher(*args, **kwargs)
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        before = [x.clone() for x in leaves]
        result = launcher(*args, **kwargs)
        written = [
            x
            for x, old in zip(leaves, before, strict=True)
            if x.is_floating_point() and not torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0))
        ]
        change(result if torch.is_tensor(result) else written[0])
        return result

    monkeypatch.setattr(owner, name, wrong)


def scaled(x):
    x.mul_(1.01)
