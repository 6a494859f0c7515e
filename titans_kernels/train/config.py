"""What a run is: one JSON file, or a few words on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

MODEL = {
    **{"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4},
    **{"variant": "mag", "window": 128, "segment": 128, "expansion": 2},
    **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None},
}


@dataclass(frozen=True)
class Config:
    """One run.

    A step reads `rows` rows of `length` bytes on each process. `pieces` steps follow each other
    through the same windows of text with the memory carried on, but not its gradient.
    """

    out: str = "train-output"  # checkpoints, logs and the model; a run found there goes on
    model: dict[str, Any] = field(default_factory=dict)  # of TitansConfig, over MODEL
    data: str | None = None  # a folder of text files; None: the sources of Python's library
    pattern: str = "*.py"  # files in it
    steps: int = 2000
    rows: int = 8
    length: int = 256
    pieces: int = 4
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    gradient_checkpointing: bool = False
    evaluate_every: int = 250
    evaluate_files: int = 8
    evaluate_length: int = 4096
    checkpoint_every: int = 250
    keep: int = 2  # checkpoints, the newest
    log_every: int = 10
    seed: int = 0
    device: str = "auto"  # "auto": a GPU of its own for each process, else the CPU
    bf16: bool = True  # on a GPU: matrix products in bfloat16, parameters in float32

    def __post_init__(self) -> None:
        for f in fields(self):
            value, default = getattr(self, f.name), getattr(type(self), f.name, None)
            numbers = int | float if isinstance(default, float) else type(default)
            if default is not None and not isinstance(value, numbers):
                takes = type(default).__name__
                raise TypeError(f"{f.name}: got {value!r}, takes a value of type {takes}")
            if type(default) is int and f.name != "seed" and value < 1:
                raise ValueError(f"{f.name}: got {value}, takes an int of at least 1")

    def model_options(self) -> dict[str, Any]:
        return MODEL | self.model

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def load(path: str | None, changes: Sequence[str] = ()) -> Config:
    """A configuration file, or none, and changes to it such as "steps=100" or "model.depth=1"."""
    values: dict[str, Any] = json.loads(Path(path).read_text()) if path else {}
    for change in changes:
        name, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"{change}: takes name=value")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text  # a bare word is a string
        if name.startswith("model."):
            values["model"] = values.get("model", {}) | {name.removeprefix("model."): value}
        else:
            values[name] = value
    known = {f.name for f in fields(Config)}
    for name in values:
        if name not in known:
            raise ValueError(f"{name}: unknown; there are {', '.join(sorted(known))}")
    return Config(**values)
