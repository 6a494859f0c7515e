"""A NaN or an infinity in a token reaches that token and those after it, in its head alone.

The definition is causal: a non-finite k, v or gate of token t makes the weights from t on
non-finite, and with them the outputs, the final state and the gradients. Backends compute blocks of
tokens by masked products, in which 0 * NaN would carry it back to earlier tokens. So they are given
finite inputs, with zeros in place of such tokens, and the results that depend on one are
overwritten by NaN. This costs no comparison inside the kernels, and is the same for every backend.
A query reaches its own output alone anyway, as each row of a product stands by itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import Packed


class NonFinite(NamedTuple):
    """Where the tokens of a `Packed` are not finite."""

    packed: Packed
    before: Tensor  # [M + 1, H] int32, such tokens ahead of every row, whatever their sequence

    def _since(self, first: Tensor, stop: Tensor) -> Tensor:
        """Whether there is one in rows `first` to `stop - 1`: [n, H] bool, for [n] of each."""
        return self.before[stop] > self.before[first]

    def _queries(self) -> Tensor:
        """[Mq, H] bool, outputs that depend on one."""
        packed = self.packed
        first, tail, start = packed.bounds[:, 0], packed.tail, packed.query_start
        query = torch.arange(len(packed.q), device=start.device)
        n = torch.searchsorted(start, query, right=True) - 1
        return self._since(first[n], first[n] + tail[n] + query - start[n] + 1)

    def mark(self, o: Tensor, final: list[Tensor], chunk_size: int) -> None:
        """Outputs [Mq, H, D] and the state at the last whole chunk, [N, H, d_in, d_out] each."""
        _overwrite([o], self._queries())
        first, whole = self.packed.bounds[:, 0], self.packed.lengths() // chunk_size * chunk_size
        _overwrite(final, self._since(first, first + whole))

    def mark_gradients(self, grads: list[Tensor]) -> None:
        """Of `Packed.differentiable()`: all of a sequence and head, but of queries before it."""
        (first, end), M = self.packed.bounds.unbind(1), len(self.packed.k)
        touched = self._since(first, end)  # [N, H]
        row = torch.arange(M, device=end.device)
        n = torch.searchsorted(end.contiguous(), row, right=True).clamp(max=len(end) - 1)
        inside = (row >= first[n]) & (row < end[n])
        state = 6 + 2 * len(self.packed.weights)
        _overwrite(grads[:1], self._queries())
        _overwrite(grads[1:6], touched[n] & inside[:, None])
        _overwrite(grads[6:state], touched)
        _overwrite(grads[state:], touched.any(0))  # the norm's


def separate(packed: Packed) -> tuple[Packed, NonFinite | None]:
    """The same with finite k, v and gates; and where they were not, None if all were."""
    tokens = packed.tokens()
    # On a CPU a look at their sums settles the common case. A GPU would have to be waited for.
    if packed.k.device.type == "cpu" and _finite(*tokens):
        return packed, None
    largest = [torch.linalg.vector_norm(x, torch.inf, -1) for x in tokens]  # [M, H] each
    bad = ~torch.stack([x.isfinite() for x in largest]).all(0)
    before = torch.nn.functional.pad(bad.cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    k, v, theta, alpha, eta = (x.masked_fill(bad[..., None], 0.0) for x in tokens)
    clean = packed._replace(k=k, v=v, theta=theta, alpha=alpha, eta=eta)
    return clean, NonFinite(clean, before)


def _finite(k: Tensor, v: Tensor, *gates: Tensor) -> bool:
    """Whether all are, on a CPU. False may mean that a sum has overflowed: that costs time only.

    An inner product reads two tensors in one pass; an infinity times 0 is NaN, and stays in it.
    """
    rates = torch.cat(gates, -1).view(-1)
    return math.isfinite(k.reshape(-1).dot(v.reshape(-1)).item() + rates.dot(rates).item())


def _overwrite(tensors: list[Tensor], where: Tensor) -> None:
    """NaN in those rows; `where` has the first dimensions of each tensor."""
    for x in tensors:
        x.masked_fill_(where.view(*where.shape, *[1] * (x.dim() - where.dim())), torch.nan)
