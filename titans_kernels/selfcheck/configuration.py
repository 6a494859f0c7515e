"""What a check covers: all that the kernels are compiled for, and what compiles them."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import tiles
from ..packing import Options, Packed, Reading
from ..stepping import Step

KERNELS = Path(__file__).parents[1] / "kernels"
BLOCKS = 256  # tokens: two blocks of the largest tile. Longer sequences run the same code
MOST = 8192  # tokens that a check runs; chunks longer than half of it do not end in it


class Configuration(NamedTuple):
    """A check that has passed holds for calls that agree in all of this."""

    operator: str  # "neural_memory", "retrieve" or "step"
    device: str
    torch: str
    triton: str
    kernels: str  # a hash of their sources
    dtype: str
    gates: str  # dtypes of theta, alpha and eta; "" where there are none
    precision: str  # of float32 products: "ieee" or "tf32"
    head_dim: int
    hidden: str  # widths of the layers between
    depth: int
    per_layer: bool  # whether gates are
    norm: bool
    activation: str
    residual: bool
    read: str  # what queries read: "token" or "chunk"
    chunk_size: int
    tokens: int  # of the longest sequence, rounded as the kernels' blocks are
    gradients: bool
    taps: int = 0  # of a layer's convolutions

    @classmethod
    def of_memory(
        cls, packed: Packed, options: Options, chunk_size: int, longest: int, gradients: bool
    ) -> Configuration:
        gates = [_name(x.dtype) for x in (packed.theta, packed.alpha, packed.eta)]
        return cls(
            "neural_memory",
            *_environment(packed.q.device),
            *(_name(packed.q.dtype), ",".join(gates), _precision(packed.q.dtype)),
            *_network(packed.q, packed.weights),
            packed.theta.shape[-1] > 1,
            packed.norm is not None,
            *options,
            *(chunk_size, _tokens(longest, chunk_size), gradients),
        )

    @classmethod
    def of_reading(cls, reading: Reading, options: Options, longest: int) -> Configuration:
        return cls(
            "retrieve",
            *_environment(reading.q.device),
            *(_name(reading.q.dtype), "", _precision(reading.q.dtype)),
            *_network(reading.q, reading.weights),
            False,
            reading.norm is not None,
            *options,
            *(1, _tokens(longest, 1), True),
        )

    @classmethod
    def of_step(cls, step: Step, options: Options) -> Configuration:
        k, gates = step.state.tokens[0], step.state.tokens[2:]
        weights, filters = step.state.memory[: len(step.state.memory) // 2], step.weight.filters
        return cls(
            "step",
            *_environment(k.device),
            *(_name(k.dtype), ",".join(_name(x.dtype) for x in gates), _precision(k.dtype)),
            *_network(k, weights),
            gates[0].shape[-1] > 1,
            bool(step.weight.norm),
            *options,
            *(k.shape[1], k.shape[1], False),
            filters[0].shape[1] if filters else 0,
        )

    def __str__(self) -> str:
        """As a user would say it."""
        hidden = f", hidden {self.hidden}" if self.hidden else ""
        sizes = f"D {self.head_dim}, depth {self.depth}{hidden}"
        sizes += f", chunk {self.chunk_size}" if self.operator != "retrieve" else ""
        training = "with" if self.gradients else "without"
        return f"{self.operator}, {self.dtype}, {sizes}, {training} gradients, on {self.device}"


@lru_cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _network(q: Tensor, weights: list[Tensor]) -> tuple[int, str, int]:
    return q.shape[-1], ",".join(str(w.shape[-1]) for w in weights[:-1]), len(weights)


def _tokens(longest: int, chunk_size: int) -> int:
    """No more than it takes to run the code of a sequence of this length, and at least a chunk."""
    most = min(max(BLOCKS, 2 * chunk_size), MOST)
    return min(tiles.rounded(longest, chunk_size), 1 << (most - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return "ieee"
    from ..kernels.launch import precision

    return precision()


def _environment(device: torch.device) -> tuple[str, str, str, str]:
    return _described(device.type, device.index)


@lru_cache
def _described(kind: str, index: int | None) -> tuple[str, str, str, str]:
    """The device and the versions of all that makes machine code for it."""
    import triton

    name = f"{kind}, interpreted"
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        architecture = getattr(
            properties, "gcnArchName", f"sm_{properties.major}{properties.minor}"
        )
        name = f"{properties.name} ({architecture})"
    # The compiler for the device comes with CUDA's or ROCm's version, in torch's name.
    return name, torch.__version__, triton.__version__, _hash()


@lru_cache
def _hash() -> str:
    """Of the kernels' sources and of what checks them."""
    sources = [*KERNELS.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
