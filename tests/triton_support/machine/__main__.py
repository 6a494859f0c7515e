"""Execute the package's launches: `python -m triton_support.machine --cases small --arch sm_80`

Prints a record of JSON a case and dtype; a case that fails is one too, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import traceback
from pathlib import Path

import torch
import triton

from .cases import CASES, SHIPPED, SMALL
from .sequence import run

SETS = {"small": SMALL, "shipped": SHIPPED, "all": tuple(CASES.values())}
DTYPES = ("float32", "bfloat16", "float16")


def kernels() -> str:
    """The commit of the kernels; "" where sources have no history."""
    command = ["git", "log", "-1", "--format=%h", "--", "titans_kernels/kernels"]
    root = Path(__file__).parents[3]
    return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m triton_support.machine")
    parser.add_argument("--arch", default="sm_80", choices=("sm_80", "sm_90"))
    parser.add_argument("--cases", default="all", help=f"of {[*SETS]}, or a case's name")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for case in SETS.get(options.cases) or (CASES[options.cases],):
        for dtype in options.dtypes:
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
