"""The configuration of a run: a file, YAML or JSON, and changes to it on the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .. import checks
from .text import tokenizer_of

MODEL = {
    **{"vocab_size": 256, "hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4},
    **{"variant": "mag", "window": 128, "segment": 128, "expansion": 2},
    **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None},
}
# What a resumed run may have otherwise than before; all else would make it another run.
CHANGEABLE = {
    *("out", "steps", "device", "gradient_checkpointing"),
    *("evaluate_every", "checkpoint_every", "keep", "log_every", "mesh"),
    *("timeout", "asynchronous", "tensorboard"),
}
MESH = ("data", "length", "heads")
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Config:
    """One run.

    A step reads `rows` rows of `length` tokens, divided among the processes. `pieces` steps follow
    each other through the same windows of text with the memory carried on, but not its gradient.

    Raises:
        TypeError, ValueError: for a value of another type or out of its range, by the name of the
            option; for an unknown option of `model`, with the nearest name that there is.
    """

    out: str = "train-output"  # checkpoints, logs and the model; a run found there is resumed
    model: dict[str, Any] = field(default_factory=dict)  # of TitansConfig, over MODEL
    start: str | None = None  # the model to begin with, a folder; its local_chunks may be others
    # A folder of text files, or a file of JSON lines with a "text" each; None: Python's library.
    data: str | None = None
    pattern: str = "*.py"  # files in the folder
    tokenizer: str | None = None  # of transformers, a folder or a name; None: tokens are bytes
    steps: int = 2000  # more than before: a finished run is resumed
    rows: int = 8  # of all processes together
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
    asynchronous: bool = False  # checkpoints are written while training continues
    log_every: int = 10
    tensorboard: bool = False  # in addition to the CSV files
    seed: int = 0
    device: str = "auto"  # "auto", "cuda": a GPU of its own for each process, if there are any
    bf16: bool = True  # on a GPU: matrix products in bfloat16, parameters in float32
    # Processes that divide among them: data, the rows of a batch (default: all that are left);
    # length, the tokens of every row; heads, those of the memories and of attention (default: 1).
    mesh: dict[str, int] = field(default_factory=dict)
    timeout: float = 600.0  # seconds that a process waits for another

    def __post_init__(self) -> None:
        for f in fields(self):
            value, default = getattr(self, f.name), getattr(type(self), f.name, None)
            if isinstance(default, bool):
                _check(f.name, value, isinstance(value, bool), "True or False")
            elif isinstance(default, int):
                least, most = (0, LARGEST_SEED) if f.name == "seed" else (1, math.inf)
                takes = f"an int of at least {least}" + f" and at most {most}" * (f.name == "seed")
                good = type(value) is int
                _check(f.name, value, good, takes, good and least <= value <= most)
            elif isinstance(default, float):
                zero = f.name == "weight_decay"  # switches it off
                takes = f"a finite number {'of at least' if zero else 'above'} 0"
                good = type(value) in (int, float)
                least_is_met = good and (value > 0 or (zero and value == 0))
                _check(f.name, value, good, takes, least_is_met and math.isfinite(value))
            elif f.name not in ("model", "mesh"):
                none = f.name in ("data", "start", "tokenizer") and value is None
                _check(f.name, value, isinstance(value, str) or none, "text", none or value != "")
        self._check_device()
        self._check_mesh()
        self._check_tokenizer()
        self._check_model()

    def _check_device(self) -> None:
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError:
                takes = "'auto', 'cpu', 'cuda' or 'cuda:N'"
                raise ValueError(f"device: got {self.device!r}, takes {takes}") from None

    def _check_mesh(self) -> None:
        _check("mesh", self.mesh, isinstance(self.mesh, dict), "data, length and heads by name")
        try:
            checks.known(map(str, self.mesh), MESH)
            for name, size in self.mesh.items():
                checks.integer(name, size, 1)
        except (TypeError, ValueError) as error:
            raise type(error)(f"mesh.{error}") from None

    def _check_tokenizer(self) -> None:
        if self.tokenizer is not None:
            try:
                tokenizer_of(self.tokenizer)
            except (OSError, ValueError) as error:
                takes = "a tokenizer of transformers, a folder or a name"
                reason = str(error).splitlines()[0]
                message = f"tokenizer: got {self.tokenizer!r}, takes {takes}: {reason}"
                raise ValueError(message) from None

    def _check_model(self) -> None:
        from ..adapt.variants import build
        from ..models import TitansConfig

        _check("model", self.model, isinstance(self.model, dict), "options of TitansConfig by name")
        try:
            config = TitansConfig(**self.model_options())
            build(config.variant, config.hidden_size, device="meta", **config.block_options())
        except (TypeError, ValueError) as error:
            raise type(error)(f"model.{error}") from None

    def model_options(self) -> dict[str, Any]:
        if self.tokenizer is None:
            return MODEL | self.model
        known = len(tokenizer_of(self.tokenizer))
        options = MODEL | {"vocab_size": known} | self.model
        got = options["vocab_size"]
        if isinstance(got, int) and got < known:
            raise ValueError(f"vocab_size: got {got}, takes at least {known}, as the tokenizer has")
        return options

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def _check(name: str, value: Any, kind: bool, takes: str, good: bool = True) -> None:
    if not kind:
        raise TypeError(f"{name}: got {value!r}, takes {takes}")
    if not good:
        raise ValueError(f"{name}: got {value!r}, takes {takes}")


def load(path: str | None, changes: Sequence[str] = ()) -> Config:
    """A configuration file, or none, and changes to it such as "steps=100" or "model.depth=1".

    Values on the command line are YAML: null, true, 3e-3, "123" in quotes as text.
    """
    for change in changes:
        if "=" not in change:
            raise ValueError(f"{change}: takes name=value")
    try:
        written: Any = OmegaConf.load(path) if path else OmegaConf.create()
        if not OmegaConf.is_dict(written):
            raise ValueError(f"{path}: got a list, takes options by name")
        merged = OmegaConf.merge(written, OmegaConf.from_dotlist(list(changes)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path or ' '.join(changes)}: {error}") from None
    checks.known(
        {str(name): value for name, value in values.items()}, [f.name for f in fields(Config)]
    )
    return Config(**values)
