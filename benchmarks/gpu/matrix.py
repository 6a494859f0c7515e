"""What is timed on a GPU: the cases of the CPU, on the kernels, and more peers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..machine_code.model import forward_flop
from ..running import peers, providers
from ..running.cases import CASES, OURS, TINY, Case
from ..running.providers import Builder
from ..running.shapes import FORWARD, Shape, attention_flop

TORCH = "PyTorch backend"
BOUNDS = dict.fromkeys(("layer", "layer-paper", "compiled", "decode"), 5e-2)  # of the others 2e-2
SHAPES = {
    "operator": (
        *(Shape(T, 16, B, 16) for B in (1, 8) for T in (2048, 8192, 32768)),
        *(Shape(8192, chunk, 8, 16, D) for D, chunk in ((64, 64), (128, 16), (128, 64), (256, 16))),
    ),
    "full": (
        Shape(32768, 16, 25, 16),
        *(Shape(T, 16, 1, 8) for T in (1024, 131072)),
        *(Shape(8192, chunk, 8, 16, D) for D, chunk in ((64, 256), (48, 16), (96, 16))),
    ),
    "compiled": (Shape(2048, 16, 8, 16),),
    "resets": (Shape(32768, 16, 1, 16), Shape(32768, 16, 8, 16)),
    "retrieve": (Shape(8192, 16, 8, 16),),
    "layer": (Shape(2048, 16, 8, 16), Shape(8192, 16, 4, 16)),
    "layer-paper": (Shape(512, 16, 2, 16), Shape(2048, 16, 1, 16)),
    "decode": (Shape(1032, 16, 1, 16), Shape(1032, 16, 64, 16)),
}
REHEARSED = ("operator", "retrieve", "layer", "layer-paper", "decode")


def cases(rehearse: bool = False) -> tuple[Case, ...]:
    """The CPU's cases with a name in SHAPES, in bfloat16 on the GPU; or as they are, tiny."""
    cpu = {case.name: case for case in CASES}
    operator, reading, layer, decode = (cpu[n] for n in ("operator", "retrieve", "layer", "decode"))
    flop = {OURS: forward_flop, "SDPA causal": attention_flop}
    # The reference would take hours at these sizes. The tests compare our own backend with it.
    build = providers.our_operator
    ours = {"definition": build, "flop": flop}
    in_place: dict[str, Builder] = {
        "in place": partial(providers.our_step_in_place, backend="triton")
    }
    found = (
        _ours(operator, build, _peers(operator) | peers.OPERATORS, **ours),
        replace(
            operator,
            name="full",
            about="The same where the GPU is full, texts are long, or sizes lie between.",
            providers={OURS: partial(build, backend="triton")} | _peers(operator) | peers.OPERATORS,
            **ours,
        ),
        replace(
            cpu["resets"],
            providers={
                OURS: partial(build, backend="triton"),
                "with resets": partial(providers.our_shards, backend="triton"),
                "TNT, both memories": partial(providers.our_tnt, backend="triton"),
            },
            definition=build,
            flop={OURS: forward_flop, "with resets": forward_flop},
        ),
        _ours(reading, providers.our_reading, {}),
        _ours(layer, providers.our_layer, _peers(layer), flop={}),
        replace(
            cpu["compiled"],
            providers={
                OURS: partial(providers.our_layer, backend="triton"),
                "compiled": partial(providers.our_compiled_layer, backend="triton"),
                f"{TORCH}, compiled": providers.our_compiled_layer,
            },
            flop={},
        ),
        _ours(cpu["layer-paper"], providers.our_layer, _peers(cpu["layer-paper"]), flop={}),
        _ours(decode, providers.our_step, _peers(decode) | peers.DECODING | in_place),
    )
    if rehearse:
        tiny = {"shapes": (replace(TINY, T=24, H=1),), "modes": (FORWARD,)}
        return tuple(replace(case, **tiny) for case in found if case.name in REHEARSED)
    return tuple(
        replace(
            case,
            inputs=partial(case.inputs, device="cuda"),
            shapes=SHAPES[case.name],
            device="cuda",
            dtype=torch.bfloat16,
            bound=BOUNDS.get(case.name, 2e-2),
        )
        for case in found
    )


def _peers(case: Case) -> dict[str, Builder]:
    return {name: build for name, build in case.providers.items() if name != OURS}


def _ours(case: Case, build: Builder, others: dict[str, Builder], **changes: Any) -> Case:
    """On the kernels, first next to our other backend."""
    kernels = partial(build, backend="triton")
    return replace(case, providers={OURS: kernels, TORCH: build, **others}, **changes)
