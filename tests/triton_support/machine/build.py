"""The core, built by g++ on first use and kept in the temporary directory by its sources' hash."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

CORE = Path(__file__).parent / "core"
# No contraction: a product and a sum are fused where PTX says so, and nowhere else.
FLAGS = [
    "-O3",
    "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-std=c++17",
]


@lru_cache(maxsize=1)
def core() -> ctypes.CDLL:
    """The library. Errors of the compiler are raised as they are."""
    text = b"".join(path.read_bytes() for path in sorted(CORE.iterdir()))
    name = f"titans_kernels-machine-{hashlib.sha256(text).hexdigest()[:16]}-{os.getuid()}.so"
    library = Path(tempfile.gettempdir()) / name
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *FLAGS, "-o", str(part), str(CORE / "core.cpp")], check=True)
        part.replace(library)
    loaded = ctypes.CDLL(str(library))
    loaded.op_names.restype = ctypes.c_char_p
    return loaded


@lru_cache(maxsize=1)
def operations() -> dict[str, int]:
    """The core's operations and their numbers."""
    return {name: i for i, name in enumerate(core().op_names().decode().split())}
