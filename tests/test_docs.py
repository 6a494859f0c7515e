"""What the documentation shows runs as it stands."""

import doctest
import re
from pathlib import Path

import pytest

import titans_kernels.layers.neural_memory
import titans_kernels.memory

README = Path(__file__).parent.parent / "README.md"


def test_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["o"].shape == names["answer"].shape == (1, 1000, 6, 64)
    assert names["token"].shape == (2, 384)


@pytest.mark.parametrize("module", [titans_kernels.memory, titans_kernels.layers.neural_memory])
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
