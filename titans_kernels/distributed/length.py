"""Sequence parallelism: every rank has all heads, and a run of each sequence's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils import _pytree as pytree

from .. import checks
from ..layers import NeuralMemory, TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from ..layers.attention import WindowAttention
from ..layers.block import Block
from ..layers.convolution import last_inputs
from ..layers.learner import Schedule
from ..layers.local import TNTMemory
from ..layers.sealing import unsealed
from ..layers.state import ContextState, LayerState, ProjectionState, WindowState, concatenate
from ..state import MemoryState
from ..transforms import values
from .agreement import Agreed, agree
from .border import ALL, Border
from .messages import Line, Relay
from .pieces import Piece, choose, divide, join_states, join_tokens

STATES = ("last", "all", "none")


class ShardLength(ParallelStyle):
    """Shard a Titans layer over the length of its sequences: sequence parallelism.

    Rank r of the mesh has the r-th run of consecutive tokens of every sequence; runs may differ in
    length, and end anywhere. Input and output are a rank's own tokens, [B, T of the rank, dim]. The
    memory's state, the last inputs of the convolutions and the keys and values that attention still
    sees go to the next rank, their gradients to the one before, by point-to-point messages. Outputs
    and gradients are those of one process: the gradient of a parameter is the share of the rank's
    tokens, and the sum over the ranks is the whole.

    A rank begins where the one before has ended. So that they work at the same time, heads and rows
    of the batch are cut into pieces, which follow one another down the ranks: of the time of the
    memory a rank waits (R - 1) / (R - 1 + pieces). `TitansMAC`, whose attention needs what the
    memory has learned, is cut into rows only.

    The call is the layer's own, `out, state = layer(x, state, cu_seqlens)`, on all ranks alike,
    with the following meaning.

    - state: what sequences continue from, on the first rank; those of other ranks are not read.
    - cu_seqlens: of the whole row, all ranks' tokens together.
    - the state that is returned is that after the last token, on the last rank, and None on the
      others; or on all, with `state="all"`; or on none, with `state="none"`. Of packed sequences
      that begin in the call only the state of the one that a border cuts is then sent.

    Resets of a `TitansTNT` cost no message of its local memories where a border is one of them; in
    a call with a state, if all sequences have read as many tokens since the last one.

    All ranks must call `backward`, through `out`. End with a barrier before a process leaves: its
    messages may be under way.

    Args:
        pieces (int | None): how many. Default: None, four for each rank that waits; on a GPU at
            most as many as leave each of its multiprocessors a memory.
        state (str): "last", "all" or "none": which ranks get the state. With "all", the next call
            may be given it everywhere. Default: "last".

    Raises:
        TypeError: for a module that is neither a `NeuralMemory` nor a Titans block.
        ValueError: in a call, if ranks differ in layer, options, shapes or dtypes, or if only some
            were given a state; it names the ranks and what each has.
        RuntimeError: in a call or in backward, if a rank is lost; it names the rank.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from titans_kernels import NeuralMemory
        >>> from titans_kernels.distributed import ShardLength
        >>> # One process; under torchrun `dist.init_process_group()`.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("length",))
        >>> layer = parallelize_module(NeuralMemory(64, heads=4), mesh["length"], ShardLength())
        >>> out, state = layer(torch.randn(1, 100, 64))  # this rank's tokens
        >>> dist.destroy_process_group()
    """

    def __init__(self, *, pieces: int | None = None, state: str = "last") -> None:
        if pieces is not None:
            checks.integer("pieces", pieces, 1)
        checks.choice("state", state, STATES)
        self.pieces, self.state = pieces, state

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        relay = Relay(Line(device_mesh.get_group()))
        for base, sharded in _WHOLE.items():
            if type(module) is base:
                module.__class__ = sharded
                break
        else:
            takes = ", ".join(cls.__name__ for cls in _WHOLE)
            raise TypeError(f"module: got {type(module).__name__}, takes one of {takes}")
        if not isinstance(module, TitansMAC):
            for part in module.modules():
                if type(part) in _PARTS:
                    part.__class__ = _PARTS[type(part)]
        for part in module.modules():
            if isinstance(part, _Linked):
                part._relay, part._pieces, part._returned = relay, self.pieces, self.state
        given = {"pieces": self.pieces, "state of ShardLength": self.state}
        module._sharding = {**getattr(module, "_sharding", {}), **given}  # type: ignore[assignment]
        return module

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pieces={self.pieces}, state={self.state!r})"


class _Linked(nn.Module):
    """A layer, or a part of one, with its tokens on several ranks."""

    _relay: Relay
    _pieces: int | None
    _returned: str


# ------------------------------------------------------------------------------- the parts


class _Memory(_Linked, NeuralMemory):
    def _heads(
        self,
        projected: list[Tensor],
        history: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        if self.conv_size > 1:
            if history is None:
                x, N = projected[0], _sequences(projected[0], cu_seqlens)
                none = x.new_zeros(N, self.conv_size - 1, x.shape[-1])
                history = (none,) * len(projected)
            history = self._relay.receive(history)
            assert history is not None
            self._relay.send(last_inputs(projected, history, cu_seqlens))
        return super()._heads(projected, history, cu_seqlens)

    def _learn(
        self,
        tokens: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        norm: tuple[Tensor, Tensor] | None,
        state: MemoryState | None,
        cu_seqlens: Tensor | None,
        schedule: Schedule,
    ) -> tuple[Tensor, MemoryState]:
        if not self._relay.open:
            return super()._learn(tokens, weights, norm, state, cu_seqlens, schedule)
        line, q = self._relay.line, tokens[0]
        N = _sequences(q, cu_seqlens)
        count = choose(self._pieces, line.count, N * self.heads, q.device)
        resets = schedule.reset_every
        if state is None and self._relay.receives(resets):
            nothing = tuple(x[:, :0] for x in tokens)
            empty = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
            # Sequences that begin on this rank begin with its weights.
            begins = torch.is_grad_enabled() and self._relay.before.rows != ALL
            with torch.set_grad_enabled(begins):
                _, state = super()._learn(nothing, weights, norm, None, empty, schedule)

        def learn(piece: Piece) -> tuple[Tensor, MemoryState]:
            before = state and self._relay.receive(piece.of_state(state), resets)
            o, after = super(_Memory, self)._learn(
                tuple(map(piece.of_tokens, tokens)),
                tuple(w[piece.heads] for w in weights),
                norm and (norm[0][piece.heads], norm[1][piece.heads]),
                before,
                cu_seqlens,
                schedule,
            )
            self._relay.send(after, resets)
            return o, after

        rows = divide(N, self.heads, count, cu_seqlens is not None)
        done = [[learn(piece) for piece in row] for row in rows]
        o = join_tokens([[o for o, _ in row] for row in done])
        return self._relay.tie(o), join_states([[after for _, after in row] for row in done])

    def _recall(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        if not self._relay.open:
            return super()._recall(x, state, cu_seqlens)
        if state is None:
            empty = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
            with _alone(self._relay):
                _, state = NeuralMemory.forward(self, x[:, :0], None, empty)
        state = self._relay.receive(state)
        self._relay.send(state)
        out, after = super()._recall(x, state, cu_seqlens)
        return self._relay.tie(out), after


class _Memories(_Memory, TNTMemory):
    """Its memories one after another, each as `_Memory` does it."""

    def _project(
        self,
        q: Tensor,
        k: Tensor,
        before: tuple[ProjectionState, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[list[Tensor], tuple[ProjectionState, ...]]:
        if not self._relay.open or self.project is None:
            return super()._project(q, k, before, cu_seqlens)
        if before is None and self._relay.receives(self.reset_every):
            empty = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
            _, before = super()._project(q[:, :0], k[:, :0], None, empty)
        before = self._relay.receive(before, self.reset_every)
        queries, after = super()._project(q, k, before, cu_seqlens)
        self._relay.send(after, self.reset_every)
        return queries, after


class _Window(_Linked, WindowAttention):
    def _window(
        self, k: Tensor, v: Tensor, state: WindowState, lengths: Tensor | None
    ) -> tuple[WindowState, Tensor, Tensor, WindowState]:
        state = self._relay.receive(state)
        state, keys, values, after = super()._window(k, v, state, lengths)
        self._relay.send(after)
        return state, self._relay.tie(keys), values, after


# ------------------------------------------------------------------------- the whole layers


class _Whole(_Linked):
    """The layer that is called: its ranks agree on the call before its parts send their states."""

    def forward(
        self, x: Tensor, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        return self._call(x, state, cu_seqlens)

    def _call(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        relay, state = self._relay, unsealed(state)
        if relay.open or not isinstance(x, Tensor) or x.dim() != 3:
            return super().forward(x, state, cu_seqlens, **options)
        read = _since_reset(state) if relay.line.first and cu_seqlens is None else None
        call = agree(relay.line, self, x, state, cu_seqlens, options, read)
        relay.fresh = call.fresh
        relay.before, relay.behind = self._borders(call, cu_seqlens)
        cu_seqlens = call.cu_seqlens
        if not relay.line.first:
            state = None
        relay.open = True
        try:
            out, after = super().forward(x, state, cu_seqlens, **options)
        finally:
            relay.open = False
        if self._returned == "all":
            after = relay.share(after)
        elif self._returned == "none" or not relay.line.last:
            after = None
        if not torch.is_grad_enabled():
            relay.line.flush()
        return relay.tie(out), after

    def _borders(self, call: Agreed, cu_seqlens: Tensor | None) -> list[Border]:
        """With the rank before and the rank behind."""
        at, persistent = (call.start, call.end), getattr(self, "n_persistent", 0)
        if cu_seqlens is None:
            return [Border.unpacked(x, persistent if call.fresh else call.read) for x in at]
        if not call.fresh or self._returned != "none":
            return [Border()] * 2
        ends = values(cu_seqlens)
        return [Border.packed(x, ends, persistent) for x in at]


class _Block(_Whole, Block[Any]):
    def _start(self, sequences: int) -> Any:
        """Persistent tokens come before the first token, so on the rank that has it."""
        if not self._relay.line.first and self._relay.before.rows == ALL:
            return None
        with _alone(self._relay):
            return super()._start(sequences)

    def _call(
        self, x: Tensor, state: Any, cu_seqlens: Tensor | None, **options: Any
    ) -> tuple[Tensor, Any]:
        out, after = super()._call(x, state, cu_seqlens, **options)
        unused = [] if self.persistent is None else [self.persistent]
        return self._relay.tie(out, *self._relay.starts(*unused)), after


class _LengthMemory(_Whole, _Memory):
    def forward(
        self,
        x: Tensor,
        state: Any = None,
        cu_seqlens: Tensor | None = None,
        learn: bool = True,
    ) -> tuple[Tensor, Any]:
        return self._call(x, state, cu_seqlens, learn=learn)


class _LengthLMM(_Block, TitansLMM):
    pass


class _LengthTNT(_Block, TitansTNT):
    pass


class _LengthMAG(_Block, TitansMAG):
    pass


class _LengthMAL(_Block, TitansMAL):
    pass


class _LengthMAC(_Block, TitansMAC):
    """Segments follow one another, so the whole block is passed through, rows after rows."""

    def _read(
        self, x: Tensor, state: ContextState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ContextState]:
        relay, N = self._relay, _sequences(x, cu_seqlens)
        if state is None:
            state = self._empty(x, N)
        if cu_seqlens is not None:
            return self._read_rows(x, state, cu_seqlens)
        pieces = divide(N, 1, choose(self._pieces, relay.line.count, N, x.device), False)
        done = []
        for (piece,) in pieces:
            rows = torch.arange(N, device=x.device)[piece.rows]
            done.append(self._read_rows(x[piece.rows], state.index_select(rows), None))
        return torch.cat([y for y, _ in done]), concatenate([after for _, after in done])

    def _read_rows(
        self, x: Tensor, state: ContextState, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, ContextState]:
        relay = self._relay
        state = relay.receive(state)
        out, after = super()._read(x, state, cu_seqlens)
        relay.send(after)
        return relay.tie(out), after


_PARTS = {NeuralMemory: _Memory, TNTMemory: _Memories, WindowAttention: _Window}
_WHOLE = {
    NeuralMemory: _LengthMemory,
    TitansLMM: _LengthLMM,
    TitansMAC: _LengthMAC,
    TitansMAG: _LengthMAG,
    TitansMAL: _LengthMAL,
    TitansTNT: _LengthTNT,
}


@contextmanager
def _alone(relay: Relay) -> Iterator[None]:
    """Without messages: what one rank computes for itself."""
    before, relay.open = relay.open, False
    try:
        yield
    finally:
        relay.open = before


def _since_reset(state: Any) -> int | None:
    """Tokens since the last reset, if all sequences of a state have read as many. Waits for them on
    a GPU: less than a rank would wait for the local memories of the one before it."""
    leaves, _ = pytree.tree_flatten_with_path(state)
    found = [x for path, x in leaves if path and getattr(path[-1], "name", None) == "position"]
    counts = set(values(torch.cat(found))) if found else set()
    return counts.pop() if len(counts) == 1 else None


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
