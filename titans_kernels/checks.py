"""What the operators take. Every message names the argument, what it got and what it takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .packing import known as has_values
from .state import MemoryState
from .transforms import values

Activation = Literal["gelu_tanh", "gelu", "silu", "relu", "identity"]
Read = Literal["token", "chunk"]
Backend = Literal["auto", "torch", "triton"]
Projection = Literal["shard", "chunk"]
ACTIVATIONS, READS, BACKENDS, PROJECTIONS = map(get_args, (Activation, Read, Backend, Projection))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Rows that a state allocates for every sequence, whatever it has read: its shapes stay the same
# from token to token, as compiled decoding needs. More is a mistake, and would exhaust the memory.
MOST_ROWS = 2**16


def _shape(x: Tensor) -> str:
    return str(list(x.shape))


def tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, takes a torch.Tensor")
    if x.layout != torch.strided or x.is_nested:
        layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise TypeError(f"{name}: got a tensor of layout {layout}, takes a dense one, strided")


def floating(name: str, x: Any, like: Tensor | None = None) -> None:
    """A tensor of a supported dtype on the device of `like`."""
    tensor(name, x)
    if x.dtype not in DTYPES:
        takes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name}: got dtype {x.dtype}, takes one of {takes}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: got device {x.device}, takes that of q, {like.device}")


def shape(name: str, x: Tensor, takes: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != takes:
        raise ValueError(f"{name}: got shape {_shape(x)}, takes {meaning} = {list(takes)}")


def not_for_onnx() -> None:
    """Said ahead of what else an exporter would stumble over."""
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if traced and torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "torch.onnx.export: got a neural memory, for which ONNX has no operators; "
            "torch.export.export takes it"
        )


def queries(q: Any) -> None:
    not_for_onnx()
    floating("q", q)
    if q.dim() != 4 or q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f"q: got shape {_shape(q)}, takes [B, T, H, D] with H, D >= 1")


def tokens(q: Any, k: Any, v: Any) -> None:
    queries(q)
    for name, x in (("k", k), ("v", v)):
        floating(name, x, q)
        shape(name, x, tuple(q.shape), "that of q, [B, T, H, D]")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, takes that of q, {q.dtype}")


def gates(q: Tensor, depth: int, **named: Any) -> None:
    B, T, H, _ = q.shape
    ranks = {}
    for name, x in named.items():
        floating(name, x, q)
        ranks[name] = x.dim()
        if tuple(x.shape) not in ((B, T, H), (B, T, H, depth)):
            raise ValueError(
                f"{name}: got shape {_shape(x)}, takes [B, T, H] = {[B, T, H]} "
                f"or [B, T, H, L] = {[B, T, H, depth]}"
            )
    if len(set(ranks.values())) > 1:
        found = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        raise ValueError(
            f"theta, alpha, eta: got ranks {found}, takes the same shape for all three"
        )


def weights(name: str, matrices: Any, heads: int, width: int, like: Tensor) -> None:
    """A tuple of [H, d_in, d_out] that leads from D to D."""
    if not isinstance(matrices, (tuple, list)) or not matrices:
        got = type(matrices).__name__ if not isinstance(matrices, (tuple, list)) else "none"
        raise TypeError(f"{name}: got {got}, takes a tuple of at least one [H, d_in, d_out] tensor")
    d_in = width
    for i, w in enumerate(matrices):
        floating(f"{name}[{i}]", w, like)
        last = i == len(matrices) - 1
        good = w.dim() == 3 and w.shape[:2] == (heads, d_in) and w.shape[2] >= 1
        if not good or (last and w.shape[2] != width):
            d_out = str(width) if last else "d_out"
            raise ValueError(
                f"{name}[{i}]: got shape {_shape(w)}, takes [H, d_in, d_out] = "
                f"[{heads}, {d_in}, {d_out}]"
            )
        d_in = w.shape[2]


def norm(value: Any, q: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        got = type(value).__name__
        if isinstance(value, (tuple, list)):
            got += f" of {len(value)}"
        raise TypeError(f"norm: got {got}, takes None or a pair (weight, bias), [H, D] each")
    for part, x in zip(("weight", "bias"), value, strict=True):
        floating(f"norm {part}", x, q)
        shape(f"norm {part}", x, tuple(q.shape[2:]), "[H, D]")


def choice(name: str, value: Any, takes: tuple[str, ...]) -> None:
    if value not in takes:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, takes))}")


def known(values: Iterable[str], names: Iterable[str]) -> None:
    """Names of options; the error for an unknown one has the nearest known name."""
    names = sorted(names)
    for name in values:
        if name not in names:
            close = difflib.get_close_matches(name, names, 1)
            takes = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"{name or repr(name)}: unknown; {takes}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, takes True or False")


def integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, takes an int of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, takes an int of at least {least}")


def state_rows(name: str, value: int) -> None:
    """A size of which a state holds as many rows."""
    if value > MOST_ROWS:
        raise ValueError(
            f"{name}: got {value}, takes at most {MOST_ROWS} where there is a state, "
            f"which holds {name} rows of every sequence"
        )


def cu_seqlens(value: Any, q: Tensor) -> None:
    """Values are looked at only on a CPU, where that costs no synchronisation."""
    if value is None:
        return
    tensor("cu_seqlens", value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {value.dtype}, takes int32 or int64")
    if value.device.type != "cpu" and value.device != q.device:
        raise ValueError(
            f"cu_seqlens: got device {value.device}, takes the CPU or that of q, {q.device}"
        )
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"cu_seqlens: got shape {_shape(value)}, takes [N + 1]")
    if q.shape[0] != 1:
        raise ValueError(f"q: got batch {q.shape[0]}, takes 1 together with cu_seqlens")
    if has_values(value):
        ends = values(value)
        if ends[0] != 0 or ends[-1] != q.shape[1]:
            raise ValueError(
                f"cu_seqlens: got {ends[0]} first and {ends[-1]} last, "
                f"takes 0 first and T = {q.shape[1]} last"
            )
        if any(b < a for a, b in pairwise(ends)):
            raise ValueError(f"cu_seqlens: got {ends}, takes values that never fall")


def state(
    name: str,
    value: Any,
    q: Tensor,
    layer_shapes: list[tuple[int, ...]] | None,
    sequences: int,
    gate_rank: int | None,
) -> None:
    """A state of that many sequences. No layer_shapes: any from D to D; no gate_rank: either."""
    if not isinstance(value, MemoryState):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a MemoryState")
    for part in ("weights", "momentum"):
        matrices = getattr(value, part)
        if not isinstance(matrices, (tuple, list)):
            raise TypeError(
                f"{name}.{part}: got {type(matrices).__name__}, "
                "takes a tuple of [N, H, d_in, d_out] tensors"
            )
        for i, x in enumerate(matrices):
            floating(f"{name}.{part}[{i}]", x, q)
        if layer_shapes is None:
            widths = [q.shape[3], *(x.shape[-1] if x.dim() else 1 for x in matrices[:-1])]
            layer_shapes = list(pairwise([*widths, q.shape[3]]))
        if len(matrices) != len(layer_shapes):
            raise ValueError(
                f"{name}.{part}: got {len(matrices)} layers, takes {len(layer_shapes)}"
            )
        wide = torch.promote_types(q.dtype, torch.float32)
        for i, (x, (d_in, d_out)) in enumerate(zip(matrices, layer_shapes, strict=True)):
            takes = (sequences, q.shape[2], d_in, d_out)
            shape(f"{name}.{part}[{i}]", x, takes, "[N, H, d_in, d_out]")
            if x.dtype != wide:
                raise TypeError(
                    f"{name}.{part}[{i}]: got dtype {x.dtype}, takes {wide}, as it was returned; "
                    "a wrapper that casts its inputs (FSDP: cast_forward_inputs) rounds states"
                )

    for part in ("k", "v", "theta", "alpha", "eta"):
        floating(f"{name}.{part}", getattr(value, part), q)
    C = max(1, value.k.shape[1]) if value.k.dim() > 1 else 1
    for part in ("k", "v"):
        x = getattr(value, part)
        shape(f"{name}.{part}", x, (sequences, C, *q.shape[2:]), "[N, chunk_size, H, D]")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}.{part}: got dtype {x.dtype}, takes that of q, {q.dtype}")
    rank = value.theta.dim() if gate_rank is None else gate_rank
    gate_shape = (sequences, C, q.shape[2], len(value.weights))[: max(3, rank)]
    for part in ("theta", "alpha", "eta"):
        x = getattr(value, part)
        shape(f"{name}.{part}", x, gate_shape, "[N, chunk_size, H] or [N, chunk_size, H, L]")
    _counts(f"{name}.length", value.length, q, sequences, C - 1, "chunk_size - 1")
    if value.reset_every is not None:
        most = value.reset_every
        _counts(f"{name}.position", value.position, q, sequences, most, "reset_every")


def same_resets(name: str, value: MemoryState, reset_every: int | None) -> None:
    """A state knows where its shard began only if it was made with the same resets."""
    if value.reset_every != reset_every:
        raise ValueError(
            f"{name}: got a state made with reset_every = {value.reset_every}, "
            f"takes one made with reset_every = {reset_every}"
        )


def _counts(name: str, value: Any, q: Tensor, sequences: int, most: int, meaning: str) -> None:
    """A number of tokens for every sequence. Values are looked at only on a CPU."""
    tensor(name, value)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {value.dtype}, takes int32 or int64")
    if value.device != q.device:
        raise ValueError(f"{name}: got device {value.device}, takes that of q, {q.device}")
    shape(name, value, (sequences,), "[N]")
    if has_values(value):
        found = values(value)
        if not all(0 <= n <= most for n in found):
            raise ValueError(f"{name}: got {found}, takes values from 0 to {meaning} = {most}")
