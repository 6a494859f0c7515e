"""Checkpoints from which a run goes on as if it had not stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from .processes import Processes


def save(
    folder: Path, step: int, shared: dict[str, Any], own: Any, processes: Processes, keep: int
) -> None:
    """Write folder/step-000123: `shared` once, `own` of every process. Whole, or not at all."""
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if processes.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    if processes.first:
        torch.save(shared, partial / "shared.pt")
    torch.save(own, partial / f"process-{processes.rank}-of-{processes.count}.pt")
    processes.wait()
    if processes.first:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(folder.glob("step-????????"))[:-keep]:
            shutil.rmtree(old)
    processes.wait()


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    return max(folder.glob("step-????????"), default=None)


def load(path: Path, processes: Processes) -> tuple[dict[str, Any], Any]:
    """(shared, own) of this process."""
    own = path / f"process-{processes.rank}-of-{processes.count}.pt"
    if not own.exists():
        found = sorted(file.name for file in path.glob("process-*"))
        raise FileNotFoundError(f"{own}: the run had other processes, {', '.join(found)}")
    files = path / "shared.pt", own
    shared, mine = (torch.load(f, map_location=processes.device, weights_only=True) for f in files)
    return shared, mine
