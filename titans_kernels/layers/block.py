"""What the Titans blocks have in common: a memory, persistent tokens, a gate, a way to decode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from .. import checks
from ..decay import Undecayed
from ..numeric import unit, wide
from . import checking, decoding
from .local import TNTMemory
from .neural_memory import NeuralMemory
from .sealing import Sealing, unsealed
from .state import State

if TYPE_CHECKING:
    from typing_extensions import Unpack

S = TypeVar("S", bound=State)


class MemoryOptions(TypedDict, total=False):
    """The options of a block that are its memory's; `NeuralMemory` says what they mean."""

    depth: int
    expansion: int
    chunk_size: int
    activation: checks.Activation
    residual: bool
    norm: bool
    per_layer_gates: bool
    conv_size: int | None
    max_learning_rate: float
    backend: checks.Backend


class BlockOptions(MemoryOptions, total=False):
    """Those, or with local_chunks those of the memories of `TitansTNT`."""

    global_chunk: int
    local_chunks: Sequence[int]
    reset_every: int
    project: checks.Projection | None


def make_memory(dim: int, **options: Any) -> NeuralMemory:
    """The memory of a block: with local_chunks a `TNTMemory`, else a `NeuralMemory`."""
    if "local_chunks" in options:
        return TNTMemory(dim, **options)
    for name in ("global_chunk", "reset_every", "project"):
        if name in options:
            raise TypeError(f"{name}: got {options[name]!r}, takes local_chunks as well")
    return NeuralMemory(dim, **options)


class Block(Sealing, Generic[S]):
    """A memory and persistent tokens [n_persistent, dim], parameters, the same for every input.

    The residual around a block, the norm before it and the MLP after it are the model's.
    """

    state_type: type[State]

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None,
        n_persistent: int,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **memory: Unpack[BlockOptions],
    ) -> None:
        """Arguments of every block; what each takes in addition is in the docstring of its class.

        Args:
            dim (int): width of the model.
            heads (int): heads of the memories, and of the attention. Default: 4.
            dim_head (int | None): width of queries, keys and values. Default: dim / heads.
            n_persistent (int): P, persistent tokens. Default: 4 in blocks with attention, else 0.
            device, dtype: of the parameters.
            **memory: of the memory, as `NeuralMemory` takes them: depth, expansion, chunk_size,
                activation, residual, norm, per_layer_gates, conv_size, max_learning_rate, backend.
                With local_chunks it is that of `TitansTNT`: global_chunk, reset_every and project
                are taken as well, chunk_size is not.
        """
        super().__init__()
        checks.integer("n_persistent", n_persistent, 0)
        self.memory = make_memory(
            dim, heads=heads, dim_head=dim_head, device=device, dtype=dtype, **memory
        )
        self.dim, self.heads, self.dim_head = dim, heads, self.memory.dim_head
        self.n_persistent = n_persistent
        persistent = torch.empty(n_persistent, dim, device=device, dtype=dtype)
        self.persistent = nn.Parameter(persistent) if n_persistent else None
        self._reset_persistent()

    def reset_parameters(self) -> None:
        """Every parameter as at the start; also after `to_empty` of a block on the meta device."""
        self._reset_persistent()
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]

    def _reset_persistent(self) -> None:
        """Of unit variance, as the tokens are that leave a norm."""
        if self.persistent is not None:
            nn.init.normal_(self.persistent)

    def forward(
        self, x: Tensor, state: S | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, S]:
        """Read x, and train the memory on it.

        Args:
            x (Tensor): [B, T, dim] in the parameters' dtype, or as autocast takes it.
            state (State | None): what B sequences (N with cu_seqlens) continue from.
            cu_seqlens (Tensor | None): [N + 1] int32 or int64, 0 first and T last: sequences packed
                end to end in a batch of 1.

        Returns:
            (out, state): [B, T, dim], and the state from which the sequences continue exactly,
            wherever x was cut, gradients included.
        """
        checking.tokens(x, "[B, T, dim]", 3, self.dim)
        if self.persistent is not None:
            checking.alike(x, self.persistent)
        checking.packing(x, cu_seqlens)
        state = unsealed(state)
        if state is None:
            state = self._start(x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)
        elif not isinstance(state, self.state_type):
            got, takes = type(state).__name__, self.state_type.__name__
            raise TypeError(f"state: got {got}, takes a {takes} or None")
        return self._read(x, state, cu_seqlens)

    if TYPE_CHECKING:  # `nn.Module` declares that calls return Any

        def __call__(
            self, x: Tensor, state: S | None = None, cu_seqlens: Tensor | None = None
        ) -> tuple[Tensor, S]: ...

    def step(self, x: Tensor, state: S | None = None, inplace: bool = False) -> tuple[Tensor, S]:
        """One token of every sequence: [B, dim] -> ([B, dim], state). `forward` of length 1.

        With `inplace` the new state is written into the tensors of the old one: see `NeuralMemory`.
        """
        checking.tokens(x, "[B, dim]", 2, self.dim)
        checks.boolean("inplace", inplace)
        if decoding.overwrites(inplace) and state is not None:
            return self._overwrite(x, state), state
        out, state = self(x[:, None], state)
        return out[:, 0], state

    def _overwrite(self, x: Tensor, state: S) -> Tensor:
        out, after = self(x[:, None], state)
        state.copy_(after)
        return out[:, 0]

    def _read(self, x: Tensor, state: S | None, cu_seqlens: Tensor | None) -> tuple[Tensor, S]:
        raise NotImplementedError

    def _start(self, sequences: int) -> S | None:
        """The state of sequences that have read the persistent tokens: once, whatever they are."""
        if self.persistent is None:
            return None
        _, state = self._read(self.persistent[None], None, None)
        return repeat(state, sequences)

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, n_persistent={self.n_persistent}"


def repeat(state: S, sequences: int) -> S:
    """The state of one sequence as that of several."""
    return state.map(lambda x: x.expand(sequences, *x.shape[1:]))


class Gate(Undecayed):
    """Equations 25 and 28: y ⊗ m = (w_y * rms(y)) * sigmoid(w_m * rms(m)). 2 dim parameters.

    The paper normalises both with learnable vectors, "followed by a non-linearity". Here that is a
    sigmoid of the memory, which gates what attention has found.
    """

    undecayed = ("attention_norm", "memory_norm")

    def __init__(
        self,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.memory_norm = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.attention_norm, self.memory_norm):
            nn.init.ones_(weight)
        self.mark_undecayed()

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        scale = y.shape[-1] ** 0.5
        attended = unit(y) * (scale * wide(self.attention_norm))
        remembered = unit(m) * (scale * wide(self.memory_norm))
        return (attended * torch.sigmoid(remembered)).to(y.dtype)
