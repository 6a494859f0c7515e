"""`make mutants`: plant the faults of the table, and say which ones no test notices."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

import torch

from . import faults, green, survivors

SLOW = 5  # seconds after which a line is worth another test

# What takes seconds to import, once for all forks. Nothing of this project may be among it.
PREPARED = ("hypothesis", "torch._dynamo", "transformers.modeling_utils", "triton")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutants", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="plant one fault in so many")
    parser.add_argument("--only", default="", help="those whose line has this text")
    parser.add_argument("--processes", type=int, default=1, help="faults planted in parallel")
    parser.add_argument("--unplanted", action="store_true", help="first see the tests green")
    options = parser.parse_args()

    import triton_support

    if not torch.cuda.is_available():
        triton_support.use_interpreter()  # before anything imports triton
    for module in PREPARED:
        importlib.import_module(module)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    table = faults()
    for fault in table:
        fault.source()  # a stale line is an error, whichever are planted
    chosen = [fault for fault in table if options.only in str(fault) + fault.test]
    chosen = chosen[:: options.every]
    if options.unplanted and not green([fault.test for fault in chosen]):
        print("a test is red without a fault", file=sys.stderr)
        return 1
    start, holes, last = time.monotonic(), 0, time.monotonic()
    for fault, wrong in survivors(chosen, options.processes):
        if os.environ.get("TIMES"):
            print(f"{time.monotonic() - start:.1f} {fault}", flush=True)
        took, last = time.monotonic() - last, time.monotonic()
        if took > SLOW:
            print(f"{took:.0f} s: {fault}  [{fault.test}]", flush=True)
        if wrong:
            holes += 1
            print(f"{wrong}: {fault}  [{fault.test}]", flush=True)
    seconds = time.monotonic() - start
    print(f"{len(chosen)} faults planted, {len(chosen) - holes} noticed, in {seconds:.0f} s")
    return int(holes > 0)


if __name__ == "__main__":
    sys.exit(main())
