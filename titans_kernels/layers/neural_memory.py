"""The neural memory as a layer: tokens in, tokens out, and one state for all that it remembers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..memory import neural_memory, retrieve
from ..numeric import unit, wide
from ..state import MemoryState
from . import checking, decoding
from .convolution import ShortConvolution, convolve
from .learner import Learner, Norm, Schedule
from .sealing import Sealing, unsealed
from .state import LayerState


class NeuralMemory(Learner, Sealing):
    """Titans' neural memory between its projections (arXiv 2501.00663): [B, T, dim] in and out.

        x --+-- q_proj, k_proj, v_proj -- convolutions -- SiLU -- unit length --+-- q, k, v
            |                                                                   |
            +-- theta_proj, alpha_proj, eta_proj -- + bias -- sigmoid --------- memory
            |                                                                   |
            +-- gate_proj -- SiLU ------------------- * --- RMSNorm, out_norm --+-- o
                                                      |
                                                  out_proj -- out

    Every head has a small MLP that is trained to map k_t to v_t while the sequence is read, and its
    output is a forward pass on q_t: `titans_kernels.neural_memory`. Learning rate (theta, up to
    max_learning_rate), weight decay (alpha) and momentum (eta) are computed from each token.
    With inner = heads * dim_head, hidden = expansion * dim_head, and a gate for each head (for each
    layer of its memory with per_layer_gates), the parameters are

        5 dim inner + 3 inner conv_size + 3 gates (dim + 1) + heads M + (3 with norm, else 1) inner

    where M = dim_head^2 at depth 1, else 2 dim_head hidden + (depth - 2) hidden^2.

    Args:
        dim (int): width of the model.
        heads (int): each has a memory of its own. Default: 4.
        dim_head (int | None): width of queries, keys and values. Default: dim / heads.
        depth (int): layers of a memory. Default: 2.
        expansion (int): width of a memory's hidden layers over dim_head. Default: 4.
        chunk_size (int): tokens that share the weights their gradients are taken at. Semantics: a
            model is run with the chunk it was trained with. Default: 16.
        activation (str): between a memory's layers: "gelu_tanh", "gelu" (erf), "silu", "relu" or
            "identity".
        residual (bool): whether a memory adds its input to its output. Default: True.
        norm (bool): whether a memory has a LayerNorm. Default: True.
        per_layer_gates (bool): gates for every layer of a memory. Default: False, one for all.
        conv_size (int | None): taps of the causal convolutions; None or 0: none. Default: 4.
        max_learning_rate (float): what theta stays below. Default: 0.1.
        backend (str): "auto", "torch" or "triton"; one that is named never falls back.
        device, dtype: of the parameters.

    Initialisation. alpha starts at sigmoid(-8) = 0.0003, a memory of 3,000 tokens, theta at 0.05,
    eta at 0.5, the LayerNorm's weight at dim_head^-1/2, the first of several layers at N(0, 1).
    What that does for the stability of the inner loop was measured: docs/concepts.md.

    Examples:
        >>> import torch
        >>> from titans_kernels import NeuralMemory
        >>> layer = NeuralMemory(64, heads=2)
        >>> out, state = layer(torch.randn(1, 100, 64))
        >>> out, state = layer.step(torch.randn(1, 64), state)
        >>> out.shape, state.memory.length
        (torch.Size([1, 64]), tensor([5], dtype=torch.int32))
    """

    undecayed = (*Learner.undecayed, "out_norm")
    state_type: type[LayerState] = LayerState
    _chunk_name = "chunk_size"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        dim_head: int | None = None,
        depth: int = 2,
        expansion: int = 4,
        chunk_size: int = 16,
        activation: checks.Activation = "gelu_tanh",
        residual: bool = True,
        norm: bool = True,
        per_layer_gates: bool = False,
        conv_size: int | None = 4,
        max_learning_rate: float = 0.1,
        backend: checks.Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("heads", heads), ("depth", depth)):
            checks.integer(name, size, 1)
        checks.integer("expansion", expansion, 1)
        checks.integer("conv_size", 0 if conv_size is None else conv_size, 0)
        checks.state_rows("conv_size", conv_size or 0)
        checking.positive("max_learning_rate", max_learning_rate)
        checking.parameter_dtype(dtype)
        checking.state_rows("chunk_size", chunk_size)
        checks.choice("activation", activation, checks.ACTIVATIONS)
        checks.choice("backend", backend, checks.BACKENDS)
        for name, flag in (("residual", residual), ("norm", norm)):
            checks.boolean(name, flag)
        checks.boolean("per_layer_gates", per_layer_gates)

        self.dim, self.heads, self.dim_head = dim, heads, checking.head_size(dim, heads, dim_head)
        self.expansion, self.chunk_size, self.conv_size = expansion, chunk_size, conv_size or 0
        self.activation, self.residual, self.norm = activation, residual, norm
        self.max_learning_rate, self.backend = max_learning_rate, backend
        inner = heads * self.dim_head

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, bias=False, device=device, dtype=dtype)

        self.q_proj, self.k_proj, self.v_proj = (linear(dim, inner) for _ in range(3))
        self.convolutions = nn.ModuleList(
            ShortConvolution(inner, self.conv_size, device=device, dtype=dtype)
            for _ in range(3 if self.conv_size else 0)
        )
        self._build(
            dim,
            heads,
            self.dim_head,
            depth=depth,
            expansion=expansion,
            norm=norm,
            per_layer_gates=per_layer_gates,
            device=device,
            dtype=dtype,
        )
        self.out_norm = nn.Parameter(torch.empty(heads, self.dim_head, device=device, dtype=dtype))
        self.gate_proj, self.out_proj = linear(dim, inner), linear(inner, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every parameter as at the start; also after `to_empty` of a layer on the meta device."""
        learners = [part for part in self.modules() if isinstance(part, Learner)]
        gates = {id(gate) for part in learners for gate in part._gate_projections()}
        for module in self.modules():
            if isinstance(module, nn.Linear):
                gain = 0.1 if id(module) in gates else 1.0
                nn.init.normal_(module.weight, std=gain * module.in_features**-0.5)
            elif isinstance(module, ShortConvolution):
                module.reset_parameters()
        for part in learners:
            part._reset()
            part.mark_undecayed()
        nn.init.ones_(self.out_norm)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        cu_seqlens: Tensor | None = None,
        learn: bool = True,
    ) -> tuple[Tensor, LayerState]:
        """Read x, and train the memory on it.

        Args:
            x (Tensor): [B, T, dim] in the parameters' dtype, or as autocast takes it.
            state (LayerState | None): what B sequences (N with cu_seqlens) continue from.
            cu_seqlens (Tensor | None): [N + 1] int32 or int64, 0 first and T last: sequences packed
                end to end in a batch of 1.
            learn (bool): False reads x without an update: `recall`. Default: True.

        Returns:
            (out, state): [B, T, dim], and the state from which the sequences continue exactly,
            wherever x was cut, gradients included. The memory and its gates are float32 at least,
            whatever x is.
        """
        checking.tokens(x, "[B, T, dim]", 3, self.dim)
        checking.alike(x, self.out_norm)
        checking.packing(x, cu_seqlens)
        checks.boolean("learn", learn)
        state = unsealed(state)
        if not learn:
            return self._recall(x, state, cu_seqlens)
        projected = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if state is not None:
            self._check_state(state, projected[0], cu_seqlens)

        history = None if state is None else state.convolution
        heads, history = self._heads(projected, history, cu_seqlens)
        o, state = self._read(x, heads, history, state, cu_seqlens)
        return self._output(o, x), state

    def _read(
        self,
        x: Tensor,
        heads: list[Tensor],
        history: tuple[Tensor, ...],
        state: LayerState | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        """What the memory reads for q, k and v, [B, T, H, D] each, and the layer's state."""
        gates, weights, norm = self._parts(x)
        tokens, memory = self._tokens(heads, gates), None if state is None else state.memory
        schedule = Schedule(self.chunk_size)
        o, memory = self._learn(tokens, weights, norm, memory, cu_seqlens, schedule)
        return o, LayerState(memory, history)

    def _tokens(self, heads: Sequence[Tensor], gates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """q, k, v, theta, alpha and eta."""
        theta, alpha, eta = gates
        return *heads, self.max_learning_rate * theta, alpha, eta

    if TYPE_CHECKING:  # `nn.Module` declares that calls return Any

        def __call__(
            self,
            x: Tensor,
            state: LayerState | None = None,
            cu_seqlens: Tensor | None = None,
            learn: bool = True,
        ) -> tuple[Tensor, LayerState]: ...

    def step(
        self, x: Tensor, state: LayerState | None = None, inplace: bool = False
    ) -> tuple[Tensor, LayerState]:
        """One token of every sequence: [B, dim] -> ([B, dim], state).

        `forward` of length 1. It costs a pass over the open chunk, at most chunk_size tokens.

        Args:
            x (Tensor): [B, dim].
            state (LayerState | None): what B sequences continue from.
            inplace (bool): write the new state into the tensors of the old one, and return that:
                no copy of the memory, the same addresses in every call, as a CUDA graph wants
                them. Other states that share those tensors are overwritten too: `state.clone()`
                first. Without gradients only. Default: False.

        Raises:
            RuntimeError: inplace while gradients are recorded.
            TypeError, ValueError: x or a state that does not fit: its name, what it got, what it
                takes.
        """
        checking.tokens(x, "[B, dim]", 2, self.dim)
        checks.boolean("inplace", inplace)
        if decoding.overwrites(inplace) and state is not None:
            return self._overwrite(x, state), state
        out, state = self(x[:, None], state)
        return out[:, 0], state

    def _overwrite(self, x: Tensor, state: LayerState) -> Tensor:
        if decoding.is_plain(self) and type(state) is LayerState:
            checking.alike(x, self.out_norm)
            return decoding.overwrite(self, x, state)
        out, after = self(x[:, None], state)
        state.copy_(after)
        return out[:, 0]

    def recall(
        self, x: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Read the memory without an update: every token reads the same weights.

        Args:
            x, state, cu_seqlens: as in `forward`; without a state, M_0 is read.

        Returns:
            (out, state): [B, T, dim], and the state with its memory untouched. Only the queries'
            convolution has moved on, so that queries too may be cut anywhere.
        """
        return self(x, state, cu_seqlens, learn=False)

    def _recall(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        q = self.q_proj(x)
        if state is None:
            empty = None if cu_seqlens is None else torch.zeros_like(cu_seqlens)
            _, state = self.forward(x[:, :0], cu_seqlens=empty)
        else:
            self._check_state(state, q, cu_seqlens)

        (q,), history = self._heads([q], state.convolution[:1], cu_seqlens)
        o = self._read_state(q, state, cu_seqlens)
        history = history + state.convolution[1:]
        return self._output(o, x), dataclasses.replace(state, convolution=history)

    def _read_state(self, q: Tensor, state: LayerState, cu_seqlens: Tensor | None) -> Tensor:
        """What the memory of a state, which stays as it is, reads for q [B, T, H, D]."""
        return self._retrieve(q, state.memory, self._norm(), cu_seqlens)

    def _retrieve(
        self, q: Tensor, state: MemoryState, norm: Norm | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return retrieve(
            q,
            state,
            norm=norm,
            activation=self.activation,
            residual=self.residual,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

    def _heads(
        self,
        projected: list[Tensor],
        history: tuple[Tensor, ...] | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The first of q, k and v, convolved and of unit length: [B, T, inner] -> [B, T, H, D].

        One token's three go through together: that is a third of the steps, which are all it costs.
        Longer ones go one at a time, in a third of the memory.
        """
        size = len(projected) if projected[0].shape[1] == 1 else 1
        filters = [convolution() for convolution in self.convolutions]
        heads: list[Tensor] = []
        kept: list[Tensor] = []
        for i in range(0, len(projected), size):
            part = slice(i, i + size)
            if filters:
                before = None if history is None else history[part]
                y, last = convolve(filters[part], projected[part], before, cu_seqlens)
                kept.extend(last)
            else:
                y = torch.stack(projected[part], 1)
            y = unit(F.silu(y).unflatten(-1, (self.heads, self.dim_head)))  # [B, S, T, H, D]
            heads.extend(y.to(projected[i].dtype).unbind(1))
        return heads, tuple(kept)

    def _learn(
        self,
        tokens: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        norm: Norm | None,
        state: MemoryState | None,
        cu_seqlens: Tensor | None,
        schedule: Schedule,
    ) -> tuple[Tensor, MemoryState]:
        """The memory of any heads over q, k, v, theta, alpha and eta."""
        q, k, v, theta, alpha, eta = tokens
        o, after = neural_memory(
            q,
            k,
            v,
            theta=theta,
            alpha=alpha,
            eta=eta,
            weights=weights,
            norm=norm,
            activation=self.activation,
            residual=self.residual,
            chunk_size=schedule.chunk_size,
            read=schedule.read,
            reset_every=schedule.reset_every,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        assert after is not None
        return o, after

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        """What the memory read, normalised, gated by x and projected: [B, T, dim]."""
        dtype = o.dtype
        o = (unit(o) * (self.dim_head**0.5 * wide(self.out_norm))).flatten(-2)
        return self.out_proj((o * F.silu(self.gate_proj(x))).to(dtype))

    def _check_state(self, state: LayerState, q: Tensor, cu_seqlens: Tensor | None) -> None:
        if type(state) is not self.state_type:
            got, takes = type(state).__name__, self.state_type.__name__
            raise TypeError(f"state: got {got}, takes a {takes} or None")
        sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        q = q.unflatten(-1, (self.heads, self.dim_head))
        own = Schedule(self.chunk_size)
        self._check_memory("state.memory", state.memory, q, sequences, own, self._chunk_name)
        checking.convolution(state.convolution, q, sequences, self.conv_size)

    def _check_memory(
        self,
        name: str,
        state: MemoryState,
        q: Tensor,
        sequences: int,
        schedule: Schedule,
        option: str,
    ) -> None:
        """The state of one memory; `option` is what the layer calls the size of its chunks."""
        checks.state(name, state, q, self.shapes, sequences, 4 if self.per_layer_gates else 3)
        if state.chunk_size != schedule.chunk_size:
            raise ValueError(
                f"{name}: got chunks of {state.chunk_size} tokens, "
                f"takes {option} = {schedule.chunk_size}"
            )
        checks.same_resets(name, state, schedule.reset_every)

    def extra_repr(self) -> str:
        memory = f"depth={self.depth}, expansion={self.expansion}, chunk_size={self.chunk_size}"
        return f"{self.dim}, heads={self.heads}, dim_head={self.dim_head}, {memory}"
