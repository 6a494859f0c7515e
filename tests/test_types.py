"""What a type checker tells a user: nothing about right calls, each mistake in its line."""

import re
import subprocess
import sys
from pathlib import Path

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
# A line each, and what is said of it.
WRONG = {
    'NeuralMemory(64, activation="gelu_tan")': '"activation".*Literal',
    "layer(out, state)[0].memory": '"Tensor" has no attribute "memory"',
    "layer(out, hybrid)": '"HybridState"; expected "LayerState',
    'replace(block, "*", "mat")': "Literal.*'mat'.*'mac'",
    'replace(block, "*", "mag", chunk_sise=8)': 'Unexpected keyword argument "chunk_sise"',
    'replace(block, "*", "mag", mode="besides")': '"mode".*Literal',
    'retrieve(out, state.memory, backend="cuda")': '"backend".*Literal',
}


def test_mistakes_are_seen_before_anything_runs(tmp_path):
    path = tmp_path / "user.py"
    path.write_text("\n".join([RIGHT, *WRONG]) + "\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = dict(re.findall(r"user\.py:(\d+): error: (.*)", result.stdout))
    first = len(RIGHT.splitlines()) + 2
    expected = {str(first + i): pattern for i, pattern in enumerate(WRONG.values())}
    assert found.keys() == expected.keys(), result.stdout + result.stderr
    for line, pattern in expected.items():
        assert re.search(pattern, found[line]), (found[line], pattern)
