"""Checks of the layers' arguments. As the operators': the argument, what it got, what it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..packing import known
from ..transforms import values
from .state import ProjectionState


def state_rows(name: str, value: Any) -> None:
    """A size of which the layer's state holds as many rows."""
    checks.integer(name, value, 1)
    checks.state_rows(name, value)


def positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, takes a number above 0")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}: got {value}, takes a number above 0")


def head_size(dim: int, heads: int, dim_head: Any) -> int:
    if dim_head is None:
        if dim % heads:
            raise ValueError(
                f"heads: got {heads}, takes a divisor of dim = {dim}, or an explicit dim_head"
            )
        return dim // heads
    checks.integer("dim_head", dim_head, 1)
    return dim_head


def rotary(value: Any, dim_head: int) -> None:
    checks.boolean("rotary", value)
    if value and dim_head % 2:
        raise ValueError(f"dim_head: got {dim_head}, takes an even number together with rotary")


def parameter_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in checks.DTYPES:
        takes = ", ".join(str(d).removeprefix("torch.") for d in checks.DTYPES)
        raise TypeError(f"dtype: got {dtype}, takes None or one of {takes}")


def tokens(x: Any, takes: str, rank: int, dim: int) -> None:
    """x of that rank and width."""
    checks.not_for_onnx()
    checks.floating("x", x)
    if x.dim() != rank or x.shape[-1] != dim:
        raise ValueError(f"x: got shape {list(x.shape)}, takes {takes} with dim = {dim}")


def alike(x: Tensor, weight: Tensor) -> None:
    """x on the device and, outside autocast, of the dtype of one of the layer's own parameters.

    Not of a projection's: those may be quantised, offloaded or sharded until they are called.
    """
    if x.device != weight.device:
        raise ValueError(f"x: got device {x.device}, takes that of the layer, {weight.device}")
    if x.dtype != weight.dtype:
        double = torch.float64 in (x.dtype, weight.dtype)
        if double or not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: got dtype {x.dtype}, takes that of the layer, {weight.dtype}")


def packing(x: Tensor, cu_seqlens: Any) -> None:
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(f"x: got batch {x.shape[0]}, takes 1 together with cu_seqlens")
    checks.cu_seqlens(cu_seqlens, x)


def convolution(value: Any, q: Tensor, sequences: int, size: int) -> None:
    """What the convolutions of a layer, of so many taps, keep of q, k and v; of 0 nothing."""
    count = 3 if size else 0
    if not isinstance(value, tuple) or len(value) != count:
        got = len(value) if isinstance(value, tuple) else value
        raise ValueError(f"state.convolution: got {got}, takes a tuple of {count} tensors")
    for i, x in enumerate(value):
        name = f"state.convolution[{i}]"
        checks.floating(name, x, q)
        takes = (sequences, size - 1, q.shape[2] * q.shape[3])
        checks.shape(name, x, takes, "[N, conv_size - 1, heads * dim_head]")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, takes that of q, {q.dtype}")


def entries(name: str, value: Any, count: int) -> None:
    if not isinstance(value, tuple) or len(value) != count:
        got = len(value) if isinstance(value, tuple) else type(value).__name__
        raise ValueError(f"{name}: got {got}, takes a tuple of {count}")


def projection(name: str, value: Any, q: Tensor, sequences: int, reset_every: int) -> None:
    """The state from which the projection of q [B, T, H, D] continues."""
    if not isinstance(value, ProjectionState):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a ProjectionState")
    x, (H, D) = value.projection, q.shape[2:]
    checks.floating(f"{name}.projection", x, q)
    checks.shape(f"{name}.projection", x, (sequences, H, D, D), "[N, H, D, D]")
    takes = torch.promote_types(q.dtype, torch.float32)
    if x.dtype != takes:
        raise TypeError(f"{name}.projection: got dtype {x.dtype}, takes {takes}")
    lengths(f"{name}.position", value.position, sequences, reset_every, q)


def held(name: str, x: Any, takes: tuple[int, ...], meaning: str, like: Tensor) -> None:
    """A tensor that a state holds, to be joined with `like`, which was made of x."""
    checks.floating(name, x)
    checks.shape(name, x, takes, meaning)
    for what in ("device", "dtype"):
        got, wanted = getattr(x, what), getattr(like, what)
        if got != wanted:
            raise TypeError(f"{name}: got {what} {got}, takes that of the projected x, {wanted}")


def lengths(name: str, x: Any, sequences: int, most: int, like: Tensor) -> None:
    """How much of a state's tensors is filled. Values are looked at only on a CPU."""
    checks.tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {x.dtype}, takes int32 or int64")
    if x.device != like.device:
        raise ValueError(f"{name}: got device {x.device}, takes that of x, {like.device}")
    checks.shape(name, x, (sequences,), "[N]")
    if known(x):
        found = values(x)
        if not all(0 <= n <= most for n in found):
            raise ValueError(f"{name}: got {found}, takes values from 0 to {most}")
