"""TNT: a global memory and local ones that are reset, which process their shards in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .. import checks
from .block import MemoryOptions
from .lmm import TitansLMM
from .local import TNTMemory

if TYPE_CHECKING:
    from typing_extensions import Unpack


class TitansTNT(TitansLMM):
    """Memories that run in parallel over the length (TNT, arXiv 2511.07343).

        p, x -- q, k, v --+-- global memory, large chunks ---------------- + -- out
                          |                                                |
                          +-- P q -- local memory 1 .. n, small chunks, ---+
                                     reset every so many tokens

        o_t = f(q_t; V_s) + sum_i f(P_t q_t; W^i_t)

    The global memory V is read with the weights of s, the start of t's chunk of global_chunk
    tokens, and never reset: within a chunk it is matrix products alone. The local memories W^i,
    one for each entry of local_chunks, return to their learned M_0 before every token at a position
    that is a multiple of reset_every, counted from the start of the sequence, persistent tokens
    included; what lies between two resets is computed in parallel. Their queries are projected
    onto the keys of the shard, or of the chunk, so far:

        P_t = sum of k_s k_s^T / |k_s|^2    for s <= t in t's shard (appendix C) or chunk (eq. 7)

    Queries, keys and values are shared; gates (theta, alpha, eta), weights and LayerNorm are each
    memory's own. [B, T, dim] -> ([B, T, dim], TNTState). With n local memories, the parameters are

        those of NeuralMemory + n (3 gates (dim + 1) + heads M + (2 inner with norm))
        + n_persistent dim

    in the terms of `NeuralMemory`. A state holds global_chunk tokens, and those of an open chunk
    of every local memory; its size does not depend on how much has been read.

    `set_local_chunks` gives the same local memories other chunks, and parameters are loaded across
    chunks of the same number: the paper trains on, for about 5% of the steps, with smaller ones.

    Args:
        global_chunk (int): tokens of a chunk of the global memory. Default: 2,048.
        local_chunks (Sequence[int]): tokens of a chunk of each local memory. Default: (16,).
        reset_every (int): tokens between two resets of the local memories. Default: 2,048.
        project (str | None): onto which keys their queries are projected, those of the "shard" or
            of the "chunk"; None: they are not. Default: "shard".

    Examples:
        >>> import torch
        >>> from titans_kernels.layers import TitansTNT
        >>> block = TitansTNT(64, heads=2, global_chunk=64, local_chunks=(8, 16), reset_every=32)
        >>> out, state = block(torch.randn(1, 100, 64))
        >>> out, state = block.step(torch.randn(1, 64), state)
        >>> out.shape, state.memory.length, state.local[0].position  # 101 tokens
        (torch.Size([1, 64]), tensor([37], dtype=torch.int32), tensor([5], dtype=torch.int32))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        dim_head: int | None = None,
        global_chunk: int = 2048,
        local_chunks: Sequence[int] = (16,),
        reset_every: int = 2048,
        project: checks.Projection | None = "shard",
        n_persistent: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **memory: Unpack[MemoryOptions],
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            dim_head=dim_head,
            n_persistent=n_persistent,
            device=device,
            dtype=dtype,
            global_chunk=global_chunk,
            local_chunks=local_chunks,
            reset_every=reset_every,
            project=project,
            **memory,
        )

    def set_local_chunks(self, local_chunks: Sequence[int]) -> None:
        """Other chunks for the same local memories, as many as there are.

        A state made before is refused by the next call.

        Args:
            local_chunks (Sequence[int]): tokens of a chunk of each local memory.

        Raises:
            TypeError, ValueError: not as many, or not ints of at least 1.
        """
        assert isinstance(self.memory, TNTMemory)
        self.memory.set_local_chunks(local_chunks)
