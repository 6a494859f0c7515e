"""Backward passes of several cotangents at once: `is_grads_batched`, and vmap over gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def one_by_one(op: Any) -> None:
    """Give a custom op that returns a list of tensors its rules: a call for each of the batch."""

    def batched(info: Any, in_dims: Any, *args: Any) -> tuple[list[Tensor], list[int]]:
        given, spec = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)
        found = []
        for i in range(info.batch_size):
            one = [x if d is None else x.select(d, i) for x, d in zip(given, dims, strict=True)]
            found.append(op(*pytree.tree_unflatten(one, spec)))
        stacked = [torch.stack(xs) for xs in zip(*found, strict=True)]
        return stacked, [0] * len(stacked)

    def legacy(*args: Any) -> list[Tensor]:
        """For `torch.autograd.grad(..., is_grads_batched=True)`, whose vmap is an older one."""
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        given, spec = pytree.tree_flatten(args)
        is_batched = torch._C._functorch.is_legacy_batchedtensor
        many = [isinstance(x, Tensor) and is_batched(x) for x in given]
        rows = [
            torch._remove_batch_dim(x, level, 1, 0).unbind() if whether else None
            for x, whether in zip(given, many, strict=True)
        ]
        found = []
        for parts in zip(*(row for row in rows if row is not None), strict=True):
            left = iter(parts)
            one = [x if row is None else next(left) for x, row in zip(given, rows, strict=True)]
            found.append(op(*pytree.tree_unflatten(one, spec)))
        return [torch._add_batch_dim(torch.stack(x), 0, level) for x in zip(*found, strict=True)]

    op.register_vmap(batched)
    op._lib.impl(op._name, legacy, "Batched")
