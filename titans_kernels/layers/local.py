"""A global memory that is read at the start of its chunks, and local ones that are reset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..numeric import wide
from . import checking
from .learner import Learner, Parts, Schedule
from .neural_memory import NeuralMemory
from .projection import project, recall
from .state import ProjectionState, TNTState


class LocalMemory(Learner):
    """The gates, M_0 and LayerNorm of a local memory: x [B, T, dim] -> `Parts`."""

    def __init__(self, dim: int, heads: int, dim_head: int, **options: Any) -> None:
        super().__init__()
        self._build(dim, heads, dim_head, **options)

    def forward(self, x: Tensor) -> Parts:
        return self._parts(x)


class TNTMemory(NeuralMemory):
    """The memories of `TitansTNT`, between the projections of a `NeuralMemory` and used as one.

    Queries, keys and values, the output's norm and projections are those of a `NeuralMemory`, as is
    the global memory. Each local memory has gates, weights and a LayerNorm of its own.

    Args:
        dim (int): width of the model.
        global_chunk, local_chunks, reset_every, project: as `TitansTNT` takes them.
        memory: as `NeuralMemory` takes it, but for chunk_size.
    """

    state_type = TNTState
    _chunk_name = "global_chunk"

    def __init__(
        self,
        dim: int,
        *,
        global_chunk: int = 2048,
        local_chunks: Sequence[int] = (16,),
        reset_every: int = 2048,
        project: checks.Projection | None = "shard",
        **memory: Any,
    ) -> None:
        checking.state_rows("global_chunk", global_chunk)
        checks.integer("reset_every", reset_every, 1)
        if project is not None:
            checks.choice("project", project, checks.PROJECTIONS)
        chunks = _chunks(local_chunks)
        if "chunk_size" in memory:
            got = memory["chunk_size"]
            raise TypeError(f"chunk_size: got {got}, takes global_chunk together with local_chunks")
        super().__init__(dim, chunk_size=global_chunk, **memory)
        self.local_chunks, self.reset_every, self.project = chunks, reset_every, project
        self.local = nn.ModuleList(
            LocalMemory(
                dim,
                self.heads,
                self.dim_head,
                depth=self.depth,
                expansion=self.expansion,
                norm=self.norm,
                per_layer_gates=self.per_layer_gates,
                device=memory.get("device"),
                dtype=memory.get("dtype"),
            )
            for _ in chunks
        )
        self.reset_parameters()

    @property
    def global_chunk(self) -> int:
        return self.chunk_size

    def set_local_chunks(self, local_chunks: Sequence[int]) -> None:
        """Other chunks for the same local memories. States made with those before are refused."""
        chunks = _chunks(local_chunks)
        if len(chunks) != len(self.local):
            raise ValueError(
                f"local_chunks: got {len(chunks)} chunks, takes one for each of the "
                f"{len(self.local)} local memories"
            )
        self.local_chunks = chunks

    def _schedules(self) -> list[Schedule]:
        return [Schedule(chunk, "token", self.reset_every) for chunk in self.local_chunks]

    def _read(
        self,
        x: Tensor,
        heads: list[Tensor],
        history: tuple[Tensor, ...],
        state: Any,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Any]:
        q, k, v = heads
        gates, weights, norm = self._parts(x)
        tokens, before = self._tokens(heads, gates), None if state is None else state.memory
        schedule = Schedule(self.chunk_size, "chunk")
        o, memory = self._learn(tokens, weights, norm, before, cu_seqlens, schedule)
        total, local = wide(o), []

        found = None if state is None else state.projections
        queries, projections = self._project(q, k, found, cu_seqlens)
        for i, schedule in enumerate(self._schedules()):
            gates, weights, norm = self.local[i](x)
            tokens = self._tokens([queries[i], k, v], gates)
            before = None if state is None else state.local[i]
            o, after = self._learn(tokens, weights, norm, before, cu_seqlens, schedule)
            total = total + o
            local.append(after)
        return total.to(q.dtype), TNTState(memory, history, tuple(local), projections)

    def _project(
        self,
        q: Tensor,
        k: Tensor,
        before: tuple[ProjectionState, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[list[Tensor], tuple[ProjectionState, ...]]:
        """The queries of every local memory, and the state of their projections."""
        count = len(self.local_chunks)
        if self.project is None:
            return [q] * count, ()
        chunks = self.local_chunks if self.project == "chunk" else (None,)
        found = [
            project(
                q, k, None if before is None else before[i], cu_seqlens, self.reset_every, chunk
            )
            for i, chunk in enumerate(chunks)
        ]
        queries = [projected for projected, _ in found]
        return queries * (count // len(queries)), tuple(after for _, after in found)

    def _read_state(self, q: Tensor, state: Any, cu_seqlens: Tensor | None) -> Tensor:
        total = wide(super()._read_state(q, state, cu_seqlens))
        x = q.new_zeros(1, 0, self.dim)  # only the LayerNorms of the local memories are needed
        found = [recall(q, one, cu_seqlens) for one in state.projections] or [q]
        queries = found * (len(self.local) // len(found))
        for i, part in enumerate(self.local):
            norm = part(x).norm
            total = total + self._retrieve(queries[i], state.local[i], norm, cu_seqlens)
        return total.to(q.dtype)

    def _check_state(self, state: Any, q: Tensor, cu_seqlens: Tensor | None) -> None:
        super()._check_state(state, q, cu_seqlens)
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        q = q.unflatten(-1, (self.heads, self.dim_head))
        checking.entries("state.local", state.local, len(self.local_chunks))
        for i, schedule in enumerate(self._schedules()):
            name, chunk = f"state.local[{i}]", f"local_chunks[{i}]"
            self._check_memory(name, state.local[i], q, sequences, schedule, chunk)
        counts = {None: 0, "shard": 1, "chunk": len(self.local_chunks)}
        checking.entries("state.projections", state.projections, counts[self.project])
        for i, one in enumerate(state.projections):
            checking.projection(f"state.projections[{i}]", one, q, sequences, self.reset_every)

    def extra_repr(self) -> str:
        chunks = f"local_chunks={self.local_chunks}, reset_every={self.reset_every}"
        return f"{super().extra_repr()}, {chunks}, project={self.project!r}"


def _chunks(value: Any) -> tuple[int, ...]:
    """`local_chunks`, checked."""
    if not isinstance(value, (tuple, list)) or not value:
        got = "none" if isinstance(value, (tuple, list)) else repr(value)
        raise TypeError(f"local_chunks: got {got}, takes a tuple of at least one int")
    for i, chunk in enumerate(value):
        checking.state_rows(f"local_chunks[{i}]", chunk)
    return tuple(value)
