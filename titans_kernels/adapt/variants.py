"""The architectures by name."""

from __future__ import annotations

from typing import Any, Literal

from .. import checks
from ..layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from ..layers.block import Block

Variant = Literal["mac", "mag", "mal", "lmm", "tnt"]
VARIANTS: dict[str, type[Block[Any]]] = {
    "mac": TitansMAC,
    "mag": TitansMAG,
    "mal": TitansMAL,
    "lmm": TitansLMM,
    "tnt": TitansTNT,
}


def build(variant: str, dim: int, **options: Any) -> Block[Any]:
    """The block of that name; its constructor refuses what it does not take."""
    checks.choice("variant", variant, tuple(VARIANTS))
    return VARIANTS[variant](dim, **options)
