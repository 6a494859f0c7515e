"""What the tests of Triton kernels need where there is no GPU.

`interpreter` makes Triton's CPU interpreter compute what a GPU would, `sanitizer` watches every
access to memory while it runs. `benchmarks.machine_code.offline` compiles for GPUs that are not
there.

Triton decides when a kernel is decorated whether it will be interpreted or compiled, and decorates
its own library when it is imported. A process does one or the other: conftest.py calls
`use_interpreter` before anything imports triton, `offline.collect` starts processes that compile.
"""

import os
import sys


def use_interpreter() -> None:
    """Interpret kernels in this process and its children. Comes before triton is imported."""
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("triton is imported already: too late to choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"
