"""The page "More than one GPU" runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs/distributed.md"


def check_the_page_runs(rank, folder):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    lines = [line for line in block.splitlines() if line]
    assert len(lines) == 14
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert names["tokens"].shape == (1, 100)
    assert all(p.grad is not None for p in names["model"].parameters())


FOUR = [check_the_page_runs]
