"""A Titans language model as a composition of its parts: one sequence of tokens [T], no state.

    x = E[tokens];  x = x + block(norm(x));  x = x + mlp(norm(x));  ...  logits = norm(x) H^T

with norm(x) = x / sqrt(mean(x^2) + eps) * w and mlp(x) = D (silu(G x) * U x). `p` holds the
parameters of the model by name, as PyTorch's `named_parameters` lists them; a model with tied
embeddings has no head of its own.
"""

from typing import Any

import torch
from torch import Tensor

from . import blocks
from .blocks import Options, Parameters
from .tnt import tnt


def logits(
    tokens: Tensor, p: Parameters, variant: str, span: Any, eps: float, options: Options
) -> Tensor:
    """[T] -> [T, vocab_size].

    `span`: the window of "mag" and "mal", the segment of "mac"; of "tnt" its local_chunks,
    reset_every and project.
    """
    embeddings = p["model.embed_tokens.weight"]
    x, i = embeddings[tokens], 0
    while layer := _under(p, f"model.layers.{i}."):
        x = x + _block(_norm(x, layer["mixer_norm.weight"], eps), layer, variant, span, options)
        x = x + _mlp(_norm(x, layer["mlp_norm.weight"], eps), layer)
        i += 1
    return _norm(x, p["model.norm.weight"], eps) @ p.get("lm_head.weight", embeddings).T


def _block(x: Tensor, layer: Parameters, variant: str, span: Any, options: Options) -> Tensor:
    mixer = _under(layer, "mixer.")
    if variant == "lmm":
        return blocks.lmm(x, mixer, options)
    if variant == "tnt":
        local_chunks, reset_every, project = span
        return tnt(x, mixer, local_chunks, reset_every, project, options)[0]
    return {"mac": blocks.mac, "mag": blocks.mag, "mal": blocks.mal}[variant](
        x, mixer, span, options
    )


def _mlp(x: Tensor, layer: Parameters) -> Tensor:
    gate, up = x @ layer["mlp.gate_proj.weight"].T, x @ layer["mlp.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ layer["mlp.down_proj.weight"].T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _under(p: Parameters, prefix: str) -> Parameters:
    return {name[len(prefix) :]: x for name, x in p.items() if name.startswith(prefix)}
