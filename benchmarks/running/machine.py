"""The machine: what it is, how fast it multiplies matrices and, if a GPU, copies."""

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

from .. import ROOT


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
    matmul_flops: float  # FLOP per second in a large matrix product, the ceiling
    matmul_size: int
    dtype: str = "float32"  # of that product
    copy_bytes: float | None = None  # read and written per second in a copy, the other ceiling
    triton: str = "not installed"
    driver: str = ""  # and clocks, of a GPU

    @property
    def slug(self) -> str:
        """For names of files."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-") + f"-{self.date}"

    def line(self) -> str:
        load = "unknown" if self.load is None else f"{self.load:.1f}"
        cores = f"{self.threads} of {self.cores} cores used, load before {load}"
        return (
            f"{self.device} ({self.capability}), {self.driver or cores} | torch {self.torch} | "
            f"Triton {self.triton} | Python {self.python} | titans_kernels {self.titans_kernels} "
            f"at {self.commit} | titans-pytorch {self.titans_pytorch} | {self.date}"
        )

    def ceiling(self) -> str:
        n = self.matmul_size
        copy = f", copy: {self.copy_bytes / 1e9:,.1f} GB/s" if self.copy_bytes else ""
        rate = f"{self.matmul_flops / 1e9:,.1f} GFLOP/s"
        return f"{self.dtype} matrix product {n} x {n} x {n}: {rate}{copy}"


def describe(threads: int, matmul_size: int = 2048, device: str = "cpu") -> Machine:
    """This machine, now; with device "cuda" its GPU."""
    gpu = device != "cpu"
    dtype = torch.bfloat16 if gpu else torch.float32
    return Machine(
        device=torch.cuda.get_device_name() if gpu else _processor(),
        capability=_capability() if gpu else torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        threads=threads,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        python=platform.python_version(),
        torch=torch.__version__,
        titans_kernels=titans_kernels.__version__,
        titans_pytorch=_version("titans-pytorch"),
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        matmul_flops=_matmul_flops(matmul_size, threads, device, dtype),
        matmul_size=matmul_size,
        dtype=str(dtype).removeprefix("torch."),
        copy_bytes=_copy_bytes(2**30 if gpu else min(2**26, matmul_size**3), threads, device),
        triton=_version("triton"),
        driver=_driver() if gpu else "",
    )


def _matmul_flops(n: int, threads: int, device: str, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=threads)
    measured = timer.blocked_autorange(min_run_time=3.0 if n > 1024 else 0.01)
    return 2 * n**3 / min(measured.times)  # a ceiling: the fastest call


def _copy_bytes(n: int, threads: int, device: str) -> float:
    a = torch.ones(n, device=device)
    b = torch.empty_like(a)
    timer = Timer("b.copy_(a)", globals={"a": a, "b": b}, num_threads=threads)
    return 2 * a.nbytes / min(timer.blocked_autorange(min_run_time=1.0).times)


def _capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def _driver() -> str:
    """The driver and the clocks that the machine came with: read, never set."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "driver unknown"
    driver, now, most, memory, power = (x.strip() for x in found.split(","))
    return f"driver {driver}, SM {now} of {most}, memory {memory}, {power}"


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
