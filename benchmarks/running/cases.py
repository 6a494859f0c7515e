"""What is compared: the registry of cases. Records only; the harness does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import providers
from .providers import Builder, Inputs
from .shapes import (
    BOTH,
    FORWARD,
    Shape,
    attention_flop,
    layer_flop,
    operator_flop,
    reading_flop,
)

OURS = "titans_kernels"


@dataclass(frozen=True)
class Case:
    """One thing to do, everyone who does it, and where.

    Args:
        name (str): what `--cases` takes.
        about (str): a sentence for the report.
        inputs (Callable): (shape, length, dtype) -> the first `length` tokens of the inputs.
        definition (Builder): what ours has to compute, from float64 inputs.
        providers (dict[str, Builder]): ours, by the name OURS, and peers.
        flop (dict[str, Callable]): by provider, (shape, mode) -> FLOP; not every one has it.
        shapes, quick (tuple[Shape, ...]): sizes, and tiny ones that only show that all works.
        modes (tuple[str, ...]): "forward", "forward+backward".
        per_token (bool): whether the output has a row for each token, of which a prefix can be
            compared with the definition.
        device, dtype (str, torch.dtype): of the inputs.
        bound (float): of ours, relative to the definition in float64, in the Frobenius norm.
    """

    name: str
    about: str
    inputs: Callable[[Shape, int, torch.dtype], Inputs]
    definition: Builder
    providers: dict[str, Builder]
    flop: dict[str, Callable[[Shape, str], int]]
    shapes: tuple[Shape, ...]
    quick: tuple[Shape, ...]
    modes: tuple[str, ...] = (FORWARD, BOTH)
    per_token: bool = True
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    bound: float = 1e-4

    def made(self, shape: Shape, length: int) -> Inputs:
        """Leaves on the device: the first `length` tokens."""
        return leaves(self.inputs(shape, length, self.dtype), self.device)

    def exact(self, shape: Shape, length: int) -> Inputs:
        """The same values in float64, for the definition."""
        return leaves(self.inputs(shape, length, self.dtype), "cpu", torch.float64)


def leaves(x: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """The same values as leaves elsewhere, in dicts and tuples as they were."""
    if isinstance(x, dict):
        return {name: leaves(part, device, dtype) for name, part in x.items()}
    if isinstance(x, tuple):
        return tuple(leaves(part, device, dtype) for part in x)
    return x.detach().to(device, dtype or x.dtype).requires_grad_()


TINY = Shape(T=64, H=2, D=16)

OPERATOR = Case(
    "operator",
    "The operator and causal softmax attention on the same q, k and v: another model, for scale.",
    providers.operator_inputs,
    providers.defined_operator,
    {OURS: providers.our_operator, "SDPA causal": providers.attention},
    {OURS: operator_flop, "SDPA causal": attention_flop},
    shapes=tuple(Shape(T=T, chunk=chunk) for chunk in (16, 64) for T in (1024, 4096, 16384)),
    quick=(TINY,),
)
ALONE = replace(OPERATOR, providers={OURS: providers.our_operator}, flop={OURS: operator_flop})

CASES = (
    Case(
        "layer",
        "The whole layer and titans-pytorch as it comes (its own, cheaper semantics: gates and "
        "updates once a chunk).",
        providers.layer_inputs,
        providers.defined_layer,
        {OURS: providers.our_layer, "titans-pytorch": providers.titans_pytorch_layer},
        {OURS: layer_flop},
        shapes=tuple(Shape(T=T) for T in (512, 1024, 2048, 4096)),
        quick=(TINY,),
    ),
    Case(
        "layer-paper",
        "The whole layer and titans-pytorch in the paper's form (chunk_size=1, batch_size=16), "
        "which is what ours computes.",
        providers.layer_inputs,
        providers.defined_layer,
        {OURS: providers.our_layer, "titans-pytorch paper": providers.titans_pytorch_paper_layer},
        {OURS: layer_flop},
        shapes=tuple(Shape(T=T) for T in (128, 256, 512)),
        quick=(TINY,),
    ),
    Case(
        "compiled",
        "The whole layer as it is, and under torch.compile.",
        providers.layer_inputs,
        providers.defined_layer,
        {OURS: providers.our_layer, "compiled": providers.our_compiled_layer},
        {OURS: layer_flop, "compiled": layer_flop},
        shapes=(Shape(T=2048),),
        quick=(TINY,),
    ),
    OPERATOR,
    replace(
        ALONE,
        name="sizes",
        about="The operator by chunk, by head dimension and by heads, one at a time from 4 heads "
        "of 64 on.",
        shapes=(
            *(Shape(T=2048, chunk=chunk, H=4) for chunk in (16, 64, 256)),
            *(Shape(T=2048, H=4, D=D) for D in (48, 96, 128, 256)),
            *(Shape(T=2048, B=B, H=8) for B in (1, 8)),
        ),
    ),
    replace(
        OPERATOR,
        name="bfloat16",
        about="The same with q, k and v in bfloat16, which ours turns into float32 on a CPU.",
        shapes=(Shape(T=4096),),
        dtype=torch.bfloat16,
        bound=2e-2,
    ),
    replace(
        ALONE,
        name="long",
        about="The operator where attention is out of reach.",
        shapes=(Shape(T=65536),),
    ),
    Case(
        "resets",
        f"The operator and the same with reset_every={providers.RESET}, which reads the shards "
        "of a sequence in parallel: another model.",
        providers.operator_inputs,
        providers.defined_operator,
        {OURS: providers.our_operator, "with resets": providers.our_shards},
        {OURS: operator_flop, "with resets": operator_flop},
        shapes=(Shape(T=16384, H=2),),
        quick=(TINY,),
        modes=(BOTH,),
    ),
    Case(
        "retrieve",
        "Forward passes of a memory without an update.",
        providers.operator_inputs,
        providers.defined_reading,
        {OURS: providers.our_reading},
        {OURS: reading_flop},
        shapes=(Shape(T=4096),),
        quick=(TINY,),
        modes=(FORWARD,),
    ),
    Case(
        "decode",
        "One token through the layer after T - 1, in the middle of a chunk.",
        providers.layer_inputs,
        providers.defined_step,
        {
            OURS: providers.our_step,
            "in place": providers.our_step_in_place,
            "titans-pytorch": providers.titans_pytorch_step,
        },
        {},
        shapes=(Shape(T=1032),),
        quick=(Shape(T=40, H=2, D=16),),
        modes=(FORWARD,),
        per_token=False,
    ),
)
