"""One call of every operator, for tools that watch kernels: `python -m benchmarks.gpu.launch`"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..running.checking import Setting, results
from ..running.shapes import Shape


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.launch", description=__doc__)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--mode", choices=("forward", "both"), default="forward")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="few tokens and heads, ragged")
    options = parser.parse_args(argv)
    T, H = (150, 2) if options.small else (4096, 16)
    shape = Shape(T, options.chunk, options.batch, H, options.head_dim)
    backward = options.mode == "both"
    setting = Setting(shape, options.dtype, options.device, backward=backward)
    found = results(setting, setting.inputs(), "triton")
    print(f"{len(found)} tensors, finite: {all(bool(x.isfinite().all()) for x in found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
