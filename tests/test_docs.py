"""What the documentation shows runs as it stands."""

import doctest
import re
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

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["o"].shape == names["answer"].shape == (1, 1000, 6, 64)
    assert names["token"].shape == (2, 384)
    assert names["written"].shape == names["more"].shape == (1, 80)


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
