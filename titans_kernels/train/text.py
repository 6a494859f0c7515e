"""Text as tokens: of files that every machine has, Python's standard library, or of one's own."""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHORTEST = 4096  # bytes; shorter files are left out
JOINED = 2**16  # bytes of a text that is made of JSON lines
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
    """Files as tensors of tokens, split by file: no piece of a held-out file is trained on."""

    train: list[Tensor]
    held_out: list[Tensor]


@cache
def tokenizer_of(name: str) -> Any:
    """A tokenizer of transformers: a folder, or a repository of the Hugging Face hub."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)


def read_text(data: str | None = None, pattern: str = "*.py", tokenizer: Any = None) -> Text:
    """All files of a few KB or more, by default Python's own sources.

    Which are held out is decided by a checksum of the name.

    Args:
        data: a folder; or a file of JSON lines, {"text": ...} each, which are joined to texts of
            `JOINED` bytes, the tokenizer's end of text (a line break) between them.
        pattern: which files of the folder.
        tokenizer: of transformers. Default: a token is a byte.
    """
    root = Path(data or sysconfig.get_path("stdlib"))
    between = getattr(tokenizer, "eos_token", None) or "\n"
    named = _joined(root, between) if root.is_file() else _files(root, pattern, data is None)
    files = [(zlib.crc32(name.encode()), _tokens(text, tokenizer)) for name, text in named]
    files.sort(key=lambda file: file[0])  # the same mixed order on every machine
    text = Text(
        [data for checksum, data in files if checksum % HELD_OUT],
        [data for checksum, data in files if checksum % HELD_OUT == 0],
    )
    if not text.train or not text.held_out:
        raise FileNotFoundError(f"too few files {pattern} over {SHORTEST} bytes under {root}")
    return text


def _files(root: Path, pattern: str, library: bool) -> Iterator[tuple[str, bytes]]:
    skipped = SKIPPED if library else set()
    for path in root.rglob(pattern):
        name = path.relative_to(root)
        if path.is_file() and skipped.isdisjoint(name.parts) and path.stat().st_size > SHORTEST:
            yield name.as_posix(), path.read_bytes()


def _joined(path: Path, between: str) -> Iterator[tuple[str, bytes]]:
    """The texts of JSON lines, one after another, in pieces that are named by their number."""
    piece, number = b"", 0
    with path.open(encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            try:
                piece += f"{json.loads(line)['text']}{between}".encode()
            except (ValueError, KeyError, TypeError):
                takes = 'JSON with a "text" in every line'
                raise ValueError(
                    f"data: line {i + 1} of {path} is not that, takes {takes}"
                ) from None
            if len(piece) >= JOINED:
                yield str(number), piece
                piece, number = b"", number + 1
    if len(piece) > SHORTEST:
        yield str(number), piece


def _tokens(text: bytes, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)
    read = text.decode("utf-8", errors="replace")
    return torch.tensor(tokenizer(read, add_special_tokens=False)["input_ids"], dtype=torch.int32)


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
