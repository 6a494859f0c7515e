"""Real text that every machine has: the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHORTEST = 4096  # bytes; shorter files are left out
HELD_OUT = 8  # one file in so many
# Folders of what others wrote, of tests, and of tables rather than text.
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class Text:
    """Files as uint8 tensors, split by file: no piece of a held-out file is trained on."""

    train: list[Tensor]
    held_out: list[Tensor]


def read_text(folder: str | None = None, pattern: str = "*.py") -> Text:
    """All files of a few KB or more, by default Python's own sources.

    Which are held out is decided by a checksum of the name.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    skipped = set() if folder else SKIPPED
    paths = {path.relative_to(root): path for path in root.rglob(pattern) if path.is_file()}
    files = []
    for name, path in paths.items():
        if skipped.isdisjoint(name.parts) and path.stat().st_size > SHORTEST:
            data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            files.append((zlib.crc32(name.as_posix().encode()), data))
    files.sort(key=lambda file: file[0])  # the same mixed order on every machine
    text = Text(
        [data for checksum, data in files if checksum % HELD_OUT],
        [data for checksum, data in files if checksum % HELD_OUT == 0],
    )
    if not text.train or not text.held_out:
        raise FileNotFoundError(f"too few files {pattern} over {SHORTEST} bytes under {root}")
    return text


def windows(files: list[Tensor], length: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Random places, every one as likely as any other: [rows, length] int64, a generator a row."""
    sizes = torch.tensor([len(file) - length + 1 for file in files])
    ends, rows = sizes.cumsum(0), []
    for generator in generators:
        place = torch.randint(int(ends[-1]), (1,), generator=generator)
        i = int(torch.searchsorted(ends, place, right=True))
        start = int(place - ends[i] + sizes[i])
        rows.append(files[i][start : start + length])
    return torch.stack(rows).long()


def excerpts(files: list[Tensor], length: int, rows: int) -> Tensor:
    """The middle of each of the first files: [rows, length] int64."""
    starts = [(len(file) - length) // 2 for file in files[:rows]]
    pieces = [file[start : start + length] for file, start in zip(files, starts, strict=False)]
    return torch.stack(pieces).long()
