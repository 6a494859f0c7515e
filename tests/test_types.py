"""What a type checker tells a user: nothing about right calls, each mistake in its line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RIGHT = """
import torch
from torch import Tensor, nn

from titans_kernels import NeuralMemory, neural_memory, replace, retrieve
from titans_kernels.layers import TitansMAG

layer = NeuralMemory(64, heads=2, activation="silu", backend="torch")
out, state = layer(torch.randn(1, 8, 64))
more: Tensor = layer(out, state)[0]
length: Tensor = state.memory.length
block = TitansMAG(64, heads=2, window=16, chunk_size=8)
y, hybrid = block(more)
keys: Tensor = hybrid.attention.keys
names: list[str] = replace(nn.Linear(2, 2), "*", "mag", mode="beside", window=16, chunk_size=8)
"""
# A line each, and what mypy and pyright say of it.
WRONG = {
    'NeuralMemory(64, activation="gelu_tan")': ('"activation".*Literal', '"activation"'),
    "layer(out, state)[0].memory": ('"Tensor" has no attribute "memory"', '"memory" for class "Te'),
    "layer(out, hybrid)": ('"HybridState"; expected "LayerState', '"HybridState".*"state"'),
    'replace(block, "*", "mat")': ("Literal.*'mat'.*'mac'", "'mat'.*\"variant\""),
    'replace(block, "*", "mag", chunk_sise=8)': ('keyword argument "chunk_sise"', '"chunk_sise"'),
    'replace(block, "*", "mag", mode="besides")': ('"mode".*Literal', '"mode"'),
    'retrieve(out, state.memory, backend="cuda")': ('"backend".*Literal', '"backend"'),
}
CHECKERS = {
    "mypy": ["mypy", "--no-error-summary", "--hide-error-context"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_mistakes_are_seen_before_anything_runs(tmp_path, checker):
    path = tmp_path / "user.py"
    path.write_text("\n".join([RIGHT, *WRONG]) + "\n")
    command = [sys.executable, "-m", *CHECKERS[checker], path]
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}  # looks for a newer one
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = dict(re.findall(r"user\.py:(\d+):(?:\d+ -)? error: (.*)", result.stdout))
    first = len(RIGHT.splitlines()) + 2
    which = list(CHECKERS).index(checker)
    expected = {str(first + i): patterns[which] for i, patterns in enumerate(WRONG.values())}
    assert found.keys() == expected.keys(), result.stdout + result.stderr
    for line, pattern in expected.items():
        assert re.search(pattern, found[line]), (found[line], pattern)
