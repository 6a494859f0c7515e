"""The model: bytes in, bytes out, and nothing but NeuralMemory between one byte and the next."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_kernels import NeuralMemory
from titans_kernels.layers import LayerState

States = list[LayerState]  # one for every block


class Block(nn.Module):
    """x + NeuralMemory(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.memory_norm = nn.RMSNorm(dim)
        self.memory = NeuralMemory(dim, heads=heads, dim_head=dim_head, expansion=2)
        self.mlp_norm = nn.RMSNorm(dim)
        self.widen, self.narrow = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        # A block starts as the identity.
        nn.init.zeros_(self.memory.out_proj.weight)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        y, state = self.memory(self.memory_norm(x), state)
        return self._mlp(x + y), state

    def step(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        y, state = self.memory.step(self.memory_norm(x), state)
        return self._mlp(x + y), state

    def _mlp(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))


class ByteModel(nn.Module):
    """Embedding, blocks, and the embedding again as the head.

    Apart from the memories, only their convolutions mix bytes: of 4 bytes in each block. With
    writing switched off, the model sees the last 3 * blocks + 1 bytes.
    """

    def __init__(self, dim: int, blocks: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.blocks = nn.ModuleList(Block(dim, heads, dim_head) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)

    def forward(self, text: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """[B, T] bytes -> logits [B, T, 256] of the bytes that follow, and the state."""
        x, after = self.embedding(text), []
        for i, block in enumerate(self.blocks):
            x, state = block(x, states[i] if states else None)
            after.append(state)
        return self._head(x), after

    def step(self, byte: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """[B] -> [B, 256]: the same, one byte of every sequence at a time."""
        x, after = self.embedding(byte), []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, state = block.step(x, states[i] if states else None)
            after.append(state)
        return self._head(x), after

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)


@torch.no_grad()
def without_writing(model: ByteModel) -> ByteModel:
    """A copy with the same weights, whose memories stay what every text starts with, M_0.

    With biases of -inf the gates are exactly 0: theta, no token is learned, and alpha, nothing is
    forgotten.
    """
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, NeuralMemory):
            layer.theta_bias.fill_(-math.inf)
            layer.alpha_bias.fill_(-math.inf)
    return model


def is_unwritten(model: ByteModel, states: States) -> bool:
    """Whether every memory still is M_0, to the last bit."""
    layers = [layer for layer in model.modules() if isinstance(layer, NeuralMemory)]
    return all(
        bool((now == start).all())
        for layer, state in zip(layers, states, strict=True)
        for now, start in zip(state.memory.weights, layer.weights, strict=True)
    )
