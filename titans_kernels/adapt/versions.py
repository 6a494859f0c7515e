"""Which transformers the hosts may come from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST = (5, 15)  # setup.py says the same; older ones have other caches


def check_transformers() -> None:
    """Refuse a transformers that is older than supported, by number.

    Raises:
        ImportError: it is older. Without any, its import fails by itself.
    """
    try:
        got = version("transformers")
    except PackageNotFoundError:
        return
    numbers = tuple(int(part) for part in got.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        takes = ".".join(map(str, OLDEST))
        raise ImportError(f"transformers: got version {got}, takes {takes} or newer")


def checkpointing() -> str:
    """What this transformers calls activation checkpointing; before 5.23 it was of gradients."""
    from transformers import PreTrainedModel

    new = hasattr(PreTrainedModel, "activation_checkpointing_enable")
    return "activation_checkpointing" if new else "gradient_checkpointing"
