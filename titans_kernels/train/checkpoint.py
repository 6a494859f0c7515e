"""Checkpoints from which a run resumes as if it had not stopped, on any number of processes.

A checkpoint is a folder: tensors, written by torch.distributed.checkpoint in safetensors files, and
manifest.json, which is written last and holds what else there is to know and a checksum of every
file. The folder has its name only once it is whole. Nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from .processes import Processes

MANIFEST = "manifest.json"
FOLDERS = "step-????????"


def save(
    folder: Path,
    step: int,
    tensors: Any,
    facts: dict[str, Any],
    processes: Processes,
    keep: int,
    asynchronous: bool = False,
) -> Callable[[], None]:
    """Write folder/step-00000123. Whole, or not at all.

    Args:
        tensors: dicts and lists of tensors; of a DTensor every process writes its own shard.
        facts: what else to remember, as JSON.
        keep: that many checkpoints stay, the newest.
        asynchronous: whether to copy the tensors only, and to write them in the background.

    Returns:
        What every process has to call in the end: it waits until all is written, and gives the
        checkpoint its name.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if processes.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    processes.wait()
    writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
    run = dcp.async_save if asynchronous else dcp.save
    # A group of its own: in another thread than the collectives of training.
    options = {"process_group": processes.background} if asynchronous else {}
    written = _alone_or_together(run, tensors, processes, storage_writer=writer, **options)

    def finish() -> None:
        if asynchronous:
            written.result()
        processes.wait()
        if processes.first:
            files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
            _write_manifest(partial / MANIFEST, {"step": step, "files": files} | facts)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(folder.glob(FOLDERS))[:-keep]:
                shutil.rmtree(old)
        processes.wait()

    return finish


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its facts.

    Warns of every damaged one that it skips, naming the damaged file.

    Raises:
        ValueError: if there are checkpoints, but none is whole.
    """
    damage = []
    for path in sorted(folder.glob(FOLDERS), reverse=True):
        try:
            facts = read_manifest(path)
        except ValueError as error:
            damage.append(str(error))
            continue
        for fault in damage:
            warnings.warn(f"{fault}; resuming from {path.name}", stacklevel=2)
        return path, facts
    if damage:
        raise ValueError(f"{'; '.join(damage)}: no checkpoint is whole; remove them to begin anew")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint that is whole.

    Raises:
        ValueError: naming the first file that is not what was written.
    """
    file = path / MANIFEST
    if not file.exists():
        raise ValueError(f"{file}: missing, the checkpoint is incomplete")
    try:
        facts = json.loads(file.read_bytes())
        checksum = facts.pop("checksum")
        whole = checksum == _checksum_of(facts) and path.name == f"step-{facts['step']:08d}"
    except (ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: damaged")
    for name, checksum in facts["files"].items():
        if not (path / name).exists():
            raise ValueError(f"{path / name}: missing")
        if _checksum(path / name) != checksum:
            raise ValueError(f"{path / name}: damaged, it has another checksum than when written")
    return facts


def load(path: Path, tensors: Any, processes: Processes) -> None:
    """Read a checkpoint into the given tensors, in place, however they are sharded.

    Raises:
        ValueError: if the checkpoint does not hold one of them in its shape.
    """
    reader = HuggingFaceStorageReader(str(path))
    try:
        _alone_or_together(dcp.load, tensors, processes, storage_reader=reader)
    except CheckpointException as error:
        reasons = "; ".join(str(reason[0]) for reason in error.failures.values())
        raise ValueError(f"{path}: {reasons}") from None


def _alone_or_together(run: Any, tensors: Any, processes: Processes, **options: Any) -> Any:
    with warnings.catch_warnings():
        # Its warning says that there are no other processes, which is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        return run(tensors, no_dist=processes.count == 1, **options)


def _write_manifest(file: Path, facts: dict[str, Any]) -> None:
    with file.open("w") as stream:
        json.dump(facts | {"checksum": _checksum_of(facts)}, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def _checksum_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
