"""Execute the package's launches: `python -m triton_support.machine --arch sm_80`

Prints a record of JSON a case and dtype; a case that fails is one too, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import triton

from .cases import CASES, ROWS, SECOND, Case
from .sequence import run

SETS = {"rows": ROWS, "second": SECOND}
DTYPES = ("float32", "bfloat16", "float16")


def kernels() -> str:
    """The commit of the kernels; "" where sources have no history."""
    command = ["git", "log", "-1", "--format=%h", "--", "titans_kernels/kernels"]
    root = Path(__file__).parents[3]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def chosen(cases: str, dtypes: Sequence[str], arch: str) -> list[tuple[Case, str]]:
    """Those of one of SETS, or a case in some dtypes."""
    rows = SETS[cases][arch] if cases in SETS else {dtype: (cases,) for dtype in dtypes}
    return [(CASES[name], dtype) for dtype, names in rows.items() for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_support.machine")
    parser.add_argument("--arch", default="sm_80", choices=("sm_80", "sm_90"))
    parser.add_argument("--cases", default="rows", choices=(*SETS, *CASES))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="of one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for case, dtype in chosen(options.cases, options.dtypes, options.arch):
        try:
            record = run(case, getattr(torch, dtype), options.arch).record()
        except Exception as error:
            failed = 1
            traceback.print_exc()
            record = {"case": case.name, "arch": options.arch, "dtype": dtype}
            record |= {"triton": triton.__version__, "failed": str(error).splitlines()[0]}
        print(json.dumps(record | {"commit": kernels()}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
