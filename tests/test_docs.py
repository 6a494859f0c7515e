"""What the documentation shows runs as it stands."""

import doctest
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import titans_kernels.adapt.attention
import titans_kernels.adapt.replacing
import titans_kernels.adapt.titans_pytorch
import titans_kernels.layers.lmm
import titans_kernels.layers.mac
import titans_kernels.layers.mag
import titans_kernels.layers.mal
import titans_kernels.layers.neural_memory
import titans_kernels.memory
import titans_kernels.models.configuration
from titans_kernels import NeuralMemory, neural_memory, replace, retrieve, warmup
from titans_kernels.adapt import TitansAttention, TitansPytorchMemory
from titans_kernels.adapt.titans_pytorch import ONLY
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans_kernels.layers.block import MemoryOptions
from titans_kernels.models import TitansConfig
from titans_kernels.train.config import Config

README = Path(__file__).parent.parent / "README.md"


def _blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_the_readme_runs():
    blocks = _blocks()
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["o"].shape == names["answer"].shape == (1, 1000, 6, 64)
    assert names["token"].shape == (2, 384)
    assert names["written"].shape == names["more"].shape == (1, 80)


def test_twenty_lines_from_nothing_to_a_model_that_generates():
    """The installation and one block, which needs nothing of those before it."""
    (block,) = (block for block in _blocks() if "replace(model" in block)
    assert 1 + len(block.splitlines()) <= 20
    for part in ("loss.backward()", "optimizer.step()", "model.generate("):
        assert part in block
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    assert names["written"].shape == (1, 80)


MODULES = [
    titans_kernels.memory,
    titans_kernels.layers.neural_memory,
    titans_kernels.layers.lmm,
    titans_kernels.layers.mac,
    titans_kernels.layers.mag,
    titans_kernels.layers.mal,
    titans_kernels.adapt.attention,
    titans_kernels.adapt.replacing,
    titans_kernels.adapt.titans_pytorch,
    titans_kernels.models.configuration,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


# ------------------------------------------------------------------------ every option


def _options(owner):
    """The names that one may set."""
    if owner is TitansConfig:
        return list(TitansConfig.__annotations__)
    if owner is Config:
        return [field.name for field in fields(Config)]
    own = inspect.signature(owner).parameters
    names = [name for name in own if name not in ("memory", "options")]  # these are the block's
    return names + (list(MemoryOptions.__annotations__) if "memory" in own else [])


def _in_readme(heading):
    """What the tables of options in a section name in their first column."""
    section = re.split(r"^## ", README.read_text(), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    tables = re.findall(r"^\| option.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


OPERATORS, BLOCKS, MODELS = "Use", "The Titans family", "In your model"
TABLES = {
    neural_memory: [OPERATORS],
    retrieve: [OPERATORS],
    NeuralMemory: [BLOCKS],
    TitansLMM: [BLOCKS],
    TitansMAC: [BLOCKS],
    TitansMAG: [BLOCKS],
    TitansMAL: [BLOCKS],
    replace: [MODELS],
    TitansAttention: [MODELS],
    TitansConfig: [BLOCKS, MODELS],
    Config: [MODELS],
}


@pytest.mark.parametrize("owner", TABLES, ids=lambda owner: owner.__name__)
def test_the_readme_names_every_option(owner):
    named = set().union(*map(_in_readme, TABLES[owner]))
    assert not [name for name in _options(owner) if name not in named]


def test_the_readme_names_no_other_options():
    for heading in (OPERATORS, BLOCKS, MODELS):
        owners = [owner for owner, headings in TABLES.items() if heading in headings]
        assert _in_readme(heading) <= {name for owner in owners for name in _options(owner)}


DOCUMENTED = [owner for owner in TABLES if owner is not Config] + [warmup, TitansPytorchMemory]


@pytest.mark.parametrize("owner", DOCUMENTED, ids=lambda owner: owner.__name__)
def test_docstrings_name_every_option(owner):
    text = inspect.getdoc(owner)
    known = ONLY if owner is TitansPytorchMemory else ()
    missing = [name for name in _options(owner) if not re.search(rf"\b{name}\b", text)]
    assert not [name for name in missing if name not in known]
