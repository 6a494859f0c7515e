"""Results, a line each, written as they are found: work that is stopped resumes from there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


class Journal:
    """Rows by stage and step in a file of JSON lines, where the last one of a name counts.

    Args:
        path (Path): written to, and read first where it is there already.
        earlier (Path): files that are only read, of machines that are gone.
    """

    def __init__(self, path: Path, *earlier: Path) -> None:
        self.path = path
        self._rows: dict[tuple[str, str], Row] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (*earlier, path):
            for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that was being written when the machine went
                self._rows[row.pop("stage"), row.pop("step")] = row

    def add(self, stage: str, step: str, row: Row) -> None:
        """Lasts when this returns, whatever happens next."""
        self._rows[stage, step] = row
        with self.path.open("ab+") as file:
            if file.tell() and not _ends_a_line(file):
                file.write(b"\n")  # a write that was killed has left a part of its line
            file.write(_line(stage, step, row))
            file.flush()
            os.fsync(file.fileno())

    def keep(self, problems: bool = True) -> None:
        """Write everything into the file, what was read elsewhere too; without problems or with."""
        self._rows = {
            name: row for name, row in self._rows.items() if problems or "problem" not in row
        }
        part = self.path.with_suffix(".part")  # the file is whole at every moment
        with part.open("wb") as file:
            file.writelines(_line(*name, row) for name, row in self._rows.items())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def get(self, stage: str, step: str) -> Row | None:
        return self._rows.get((stage, step))

    def stage(self, stage: str) -> dict[str, Row]:
        """Its rows by step."""
        return {step: row for (where, step), row in self._rows.items() if where == stage}


def _line(stage: str, step: str, row: Row) -> bytes:
    return json.dumps({"stage": stage, "step": step, **row}, default=str).encode() + b"\n"


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def in_short(failure: Exception) -> str:
    first, *_ = str(failure).splitlines() or [""]
    return f"{type(failure).__name__}: {first}"[:300]
