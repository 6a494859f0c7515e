"""The machine: what it is, and how fast it multiplies matrices."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

import titans_kernels

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Machine:
    """Where figures come from, and what of."""

    device: str
    capability: str
    cores: int
    threads: int
    load: float | None  # of the machine when the run began, in busy cores
    python: str
    torch: str
    titans_kernels: str
    titans_pytorch: str
    commit: str
    date: str
    matmul_flops: float  # FLOP per second in a large float32 matrix product, the ceiling
    matmul_size: int

    @property
    def slug(self) -> str:
        """For names of files."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") + f"-{self.date}"

    def line(self) -> str:
        load = "unknown" if self.load is None else f"{self.load:.1f}"
        return (
            f"{self.device} ({self.capability}), {self.threads} of {self.cores} cores used, "
            f"load before {load} | torch {self.torch} | Python {self.python} | "
            f"titans_kernels {self.titans_kernels} at {self.commit} | "
            f"titans-pytorch {self.titans_pytorch} | {self.date}"
        )

    def ceiling(self) -> str:
        n = self.matmul_size
        return f"float32 matrix product {n} x {n} x {n}: {self.matmul_flops / 1e9:.1f} GFLOP/s"


def describe(threads: int, matmul_size: int = 2048) -> Machine:
    """This machine, now."""
    return Machine(
        device=_processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        threads=threads,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        torch=torch.__version__,
        titans_kernels=titans_kernels.__version__,
        titans_pytorch=_version("titans-pytorch"),
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        matmul_flops=_matmul_flops(matmul_size, threads),
        matmul_size=matmul_size,
    )


def _matmul_flops(n: int, threads: int) -> float:
    a, b = torch.randn(2, n, n)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads)
    measured = timer.blocked_autorange(min_run_time=3.0 if n > 1024 else 0.01)
    return 2 * n**3 / min(measured.times)  # a ceiling: the fastest call


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Short hash, with a plus sign if tracked files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
