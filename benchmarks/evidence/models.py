"""Small models that are the same but for what mixes their tokens.

x + mixer(norm(x)), then x + MLP(norm(x)), twice. The MLPs are as wide as it takes for all models to
have the same number of parameters, to within a percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_kernels.layers import NeuralMemory, TitansLMM, TitansMAG, TitansTNT
from titans_kernels.layers.attention import WindowAttention
from titans_kernels.layers.convolution import ShortConvolution, convolve

DIM, HEADS, LAYERS, WINDOW, EXPANSION = 64, 2, 2, 32, 2
PARAMETERS = 150_000  # of every model


class GatedLinearAttention(nn.Module):
    """The memory's shell around a matrix that is added to and decays: no surprise, no momentum.

    W_t = a_t W_{t-1} + k_t v_t^T, o_t = q_t W_t, with a number a_t for every token and head (as in
    Mamba-2 and simple GLA). Projections, convolutions, unit length, output norm and output gate are
    those of `NeuralMemory`. Written out as attention, quadratic in T.
    """

    def __init__(self, dim: int, heads: int, conv_size: int = 4) -> None:
        super().__init__()
        self.heads, self.dim_head = heads, dim // heads
        self.qkv = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.convolutions = nn.ModuleList(ShortConvolution(dim, conv_size) for _ in range(3))
        self.decay = nn.Linear(dim, heads)
        nn.init.constant_(self.decay.bias, 6.0)  # keeps 0.9975 of what it knows at first
        self.out_norm = nn.RMSNorm(self.dim_head, eps=1e-6)
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        heads = []
        for projection, convolution in zip(self.qkv, self.convolutions, strict=True):
            y, _ = convolve([convolution()], [projection(x)], None, None)
            y = F.silu(y[:, 0]).unflatten(-1, (self.heads, self.dim_head)).transpose(1, 2)
            heads.append(F.normalize(y, dim=-1))
        q, k, v = heads  # [B, H, T, D]
        kept = F.logsigmoid(self.decay(x)).cumsum(1).transpose(1, 2)  # [B, H, T]
        since = kept[..., :, None] - kept[..., None, :]
        causal = torch.ones(since.shape[-2:], dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.mT) * since.masked_fill(~causal, -math.inf).exp()  # [B, H, T, T]
        o = self.out_norm(scores @ v).transpose(1, 2).flatten(2)
        return self.out_proj(o * F.silu(self.gate_proj(x))), None


Mixer = Callable[[], nn.Module]
_memory = {"heads": HEADS, "expansion": EXPANSION, "max_learning_rate": 0.3}
_lmm = partial(TitansLMM, DIM, **_memory)
_chunks = {"global_chunk": 32, "local_chunks": (8,), "reset_every": 64}
_tnt = partial(TitansTNT, DIM, **_chunks, **_memory)


def _shut(gate: str, **options: Any) -> nn.Module:
    """The memory with a gate that is exactly 0 and stays so: sigmoid(-inf)."""
    block = TitansLMM(DIM, **{**_memory, **options})
    memory: NeuralMemory = block.memory
    bias, projection = getattr(memory, f"{gate}_bias"), getattr(memory, f"{gate}_proj")
    nn.init.constant_(bias, -math.inf)
    for parameter in (bias, projection.weight):
        parameter.requires_grad_(False)
    return block


@dataclass(frozen=True)
class Kind:
    """A model: what it is called, what it is, what mixes its tokens."""

    name: str
    what: str
    mixer: Mixer


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "memory",
            f"TitansLMM: depth 2, expansion {EXPANSION}, theta up to 0.3",
            _lmm,
        ),
        Kind(
            "mag",
            f"TitansMAG, the same memory, window {WINDOW}",
            partial(TitansMAG, DIM, window=WINDOW, **_memory),
        ),
        Kind(
            "tnt",
            "TitansTNT: the same memory in chunks of 32, and one in chunks of 8, reset every 64",
            _tnt,
        ),
        Kind(
            "window",
            f"softmax attention over the last {WINDOW} tokens, rotary",
            partial(WindowAttention, DIM, HEADS, DIM // HEADS, True, WINDOW),
        ),
        Kind(
            "linear",
            "gated linear attention, a decay per token and head, convolutions of 4",
            partial(GatedLinearAttention, DIM, HEADS),
        ),
        Kind(
            "delta",
            "gated delta rule: a matrix, learned token by token, no norm, no momentum",
            partial(_shut, "eta", depth=1, norm=False, chunk_size=1, max_learning_rate=0.5),
        ),
        Kind("eta = 0", "memory without momentum", partial(_shut, "eta")),
        Kind("alpha = 0", "memory without forgetting", partial(_shut, "alpha")),
        Kind("depth 1", "memory that is one matrix, with its norm", partial(_lmm, depth=1)),
        Kind("not onto keys", "tnt without the projection", partial(_tnt, project=None)),
        Kind("no conv", "memory without convolutions", partial(_lmm, conv_size=None)),
        Kind(
            "theta 0.1",
            "memory with theta up to 0.1, the layer's default",
            partial(_lmm, max_learning_rate=0.1),
        ),
    )
}
ABLATIONS = ("eta = 0", "alpha = 0", "depth 1", "not onto keys", "no conv", "theta 0.1")


class Block(nn.Module):
    """A mixer and an MLP, each with a residual."""

    def __init__(self, mixer: nn.Module, hidden: int) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(DIM), mixer
        self.mlp_norm = nn.RMSNorm(DIM)
        self.widen, self.narrow = nn.Linear(DIM, hidden), nn.Linear(hidden, DIM)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.mixer(self.mixer_norm(x))
        x = x + mixed
        return x + self.narrow(F.gelu(self.widen(self.mlp_norm(x))))


class Model(nn.Module):
    """Tokens [B, T] -> logits [B, T, vocabulary]."""

    def __init__(self, kind: str, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, DIM)
        mixers = [KINDS[kind].mixer() for _ in range(LAYERS)]
        mixing = sum(p.numel() for mixer in mixers for p in mixer.parameters())
        fixed = mixing + (2 * vocabulary + 1 + 3 * LAYERS) * DIM
        hidden = (PARAMETERS - fixed) // (LAYERS * (2 * DIM + 1))
        self.blocks = nn.ModuleList(Block(mixer, hidden) for mixer in mixers)
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
