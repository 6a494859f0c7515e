"""Reading held-out text with a trained model, as a stream."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..train.measures import bits
from .model import ByteModel, States


@torch.inference_mode()
def read(
    model: ByteModel, text: Tensor, piece: int = 256, fresh: bool = False
) -> tuple[Tensor, States]:
    """Bits of every byte of text [B, T] but the first, [B, T - 1], and the states at the end.

    Reads `piece` bytes at a time; `fresh` forgets everything before each piece.
    """
    costs, states = [], None
    for i in range(0, text.shape[1] - 1, piece):
        chunk = text[:, i : i + piece + 1]
        logits, states = model(chunk[:, :-1], None if fresh else states)
        costs.append(bits(logits, chunk[:, 1:]))
    assert states is not None
    return torch.cat(costs, dim=1), states


@dataclass(frozen=True)
class Stream:
    """What reading byte by byte gave."""

    bits: Tensor  # [B, T - 1]
    states: States
    seconds: float
    state_bytes: list[int]  # of one sequence, after every byte


@torch.inference_mode()
def stream(model: ByteModel, text: Tensor) -> Stream:
    """`read`, one byte of every row at a time."""
    from tqdm import tqdm

    costs, states, sizes = [], None, []
    start = time.perf_counter()
    for now, after in tqdm(
        zip(text.T[:-1], text.T[1:], strict=True),
        desc="streaming",
        total=text.shape[1] - 1,
        unit="step",
        mininterval=0.5,
    ):
        logits, states = model.step(now, states)
        costs.append(bits(logits, after))
        sizes.append(state_bytes(states))
    assert states is not None
    return Stream(torch.stack(costs, dim=1), states, time.perf_counter() - start, sizes)


def state_bytes(states: States) -> int:
    """Bytes that one sequence's states take."""
    tensors = [tensor for tensor in pytree.tree_leaves(states) if isinstance(tensor, Tensor)]
    return sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)


@torch.inference_mode()
def write_on(
    model: ByteModel, byte: Tensor, states: States, length: int, temperature: float, seed: int
) -> tuple[bytes, float]:
    """Continue one sequence, [1] its last byte: `length` sampled bytes, and the seconds it took."""
    generator = torch.Generator().manual_seed(seed)
    written, start = [], time.perf_counter()
    for _ in range(length):
        logits, states = model.step(byte, states)
        weights = (logits[0].float().cpu() / temperature).softmax(-1)
        byte = torch.multinomial(weights, 1, generator=generator).to(logits.device)
        written.append(int(byte))
    return bytes(written), time.perf_counter() - start
