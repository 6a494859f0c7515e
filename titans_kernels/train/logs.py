"""The logs of a run: CSV files, and tensorboard's in addition."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


class Logs:
    """train.csv and evaluation.csv in a folder, each row beginning with its step.

    Rows after `step`, which a resumed run will write again, are removed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self.folder = folder
        for file in folder.glob("*.csv"):
            _forget_later(file, step)
        self.writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, name: str, rows: list[dict[str, float]]) -> None:
        """Append rows to a file of that name."""
        path = self.folder / f"{name}.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)
        if self.writer is not None:
            for row in rows:
                self._draw(name, dict(row))

    def _draw(self, name: str, row: dict[str, float]) -> None:
        step, span = int(row.pop("step")), ""
        if "from" in row:
            span = f"/{int(row.pop('from'))}-{int(row.pop('to'))}"
        for quantity, value in row.items():
            self.writer.add_scalar(f"{name}/{quantity}{span}", value, step)
        self.writer.flush()


def _forget_later(file: Path, step: int) -> None:
    """Drop the rows after a step, and one that was being written when the run stopped."""
    with file.open(newline="") as stream:
        head, *rows = list(csv.reader(stream)) or [[]]
    if not head:
        file.unlink()
        return
    rows = [row for row in rows if len(row) == len(head) and int(row[0]) <= step]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
