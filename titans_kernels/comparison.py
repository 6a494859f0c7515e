"""How far a result may be from the definition: what rounding costs, and no more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

TF32_EPS = 2.0**-10


class Bounds(NamedTuple):
    """The largest relative errors allowed."""

    forward: float  # in outputs and final state
    gradient: float
    factor: float  # how far the factor between a result and the reference may be from 1


def bounds(dtype: torch.dtype, length: int, tf32: bool = False) -> Bounds:
    """What rounding alone may cost, where nothing in the inner loop amplifies it.

    float64: 1e-11 and 1e-10, what the project promises for every size and setting.

    float32: every token rounds the memory and what is read from it by about eps. The signs are
    random, so sqrt(length) * eps is one standard deviation; four of them are allowed. The
    gradient goes that way twice, there and back.

    bfloat16, float16, and float32 whose products are TF32: the reference gets the same rounded q,
    k and v, and sums are float32 on every backend. The dtype's eps (two roundings) enters where a
    tensor is stored in it, and where a backend rounds the operands of a matrix product. The longest
    way to an output, two layers written and two read, has 4 products of 2 operands: 4 eps, and
    twice that for the gradient, there and back. That would hide a result that is 1% too large. But
    roundings are random, and next to nothing of their sum lies along the reference: a factor
    between the two is found to eps.
    """
    eps = TF32_EPS if tf32 else torch.finfo(dtype).eps
    if dtype == torch.float64:
        return Bounds(1e-11, 1e-10, 1e-10)
    short = tf32 or dtype.itemsize == 2
    forward = 4 * eps * (1 if short else length**0.5)
    return Bounds(forward, 2 * forward, eps if short else 2 * forward)


class Worst(NamedTuple):
    """The worst relative error among some tensors, and which one has it."""

    error: float
    name: str


def worst_error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Worst | None:
    """The worst of ||found - wanted|| / ||wanted||; a nan is worse than any number."""
    errors = {}
    for name, reference in wanted.items():
        difference, scale = float((found[name] - reference).norm()), float(reference.norm())
        errors[name] = difference / scale if scale else (math.inf if difference else 0.0)
    return _worst(errors)


def worst_factor(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Worst | None:
    """The worst of |f - 1|, where `f wanted` is the multiple that is closest to `found`."""
    errors = {}
    for name, reference in wanted.items():
        along, square = ((x * reference).sum() for x in (found[name] - reference, reference))
        errors[name] = abs(float(along / square)) if square else 0.0
    return _worst(errors)


def _worst(errors: Mapping[str, float]) -> Worst | None:
    numbers = (Worst(math.inf if math.isnan(error) else error, n) for n, error in errors.items())
    return max(numbers, default=None)
