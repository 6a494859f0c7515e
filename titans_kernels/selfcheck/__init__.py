"""`backend="auto"` on a GPU: the kernels check themselves where they run, once, then they are used.

`configuration` says what a check covers, `check` runs one, `records` keeps those that passed,
`decide` connects them.
"""

from .decide import CHECK, MODES, TORCH, memory_backend, mode, reading_backend, step_backend

__all__ = ["CHECK", "MODES", "TORCH", "memory_backend", "mode", "reading_backend", "step_backend"]
