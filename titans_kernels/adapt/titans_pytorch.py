"""The `NeuralMemory` of titans-pytorch, for its users: arguments, parameters and calls are its own.

    from titans_kernels.adapt import TitansPytorchMemory as NeuralMemory

What stands between projections and output is `titans_kernels.neural_memory`. titans-pytorch itself
is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..layers import checking
from ..layers.learner import MemoryWeights
from ..memory import neural_memory, retrieve
from ..state import MemoryState
from .titans_pytorch_table import ELSEWHERE, ONLY, refuse_name, refuse_others

__all__ = ["ONLY", "NeuralMemState", "TitansPytorchMemory", "mem_state_detach"]


class NeuralMemState(NamedTuple):
    """What a call returns, to be given to the next one; as large after any number of tokens.

    Args:
        seq_index (int): tokens stored so far.
        states (MemoryState): the memories, and the tokens of the open batch.
    """

    seq_index: int
    states: MemoryState

    @property
    def weights(self) -> dict[str, Tensor]:
        """With which the open batch began, by titans-pytorch's names: [B * heads, d_in, d_out]."""
        return {f"weights.{i}": w.flatten(0, 1) for i, w in enumerate(self.states.weights)}

    def detach(self) -> NeuralMemState:
        """The same values, detached from the graph: truncated backpropagation."""
        return self._replace(states=self.states.detach())


torch.serialization.add_safe_globals([NeuralMemState])


def mem_state_detach(state: NeuralMemState) -> NeuralMemState:
    """`state.detach()`, by titans-pytorch's name."""
    return state.detach()


def __getattr__(name: str) -> NoReturn:
    if name in ELSEWHERE:
        refuse_name(name, AttributeError)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class MultiheadRMSNorm(nn.Module):
    """RMSNorm of [B, T, H, D] along D, with a scale for each head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:]) * (self.gamma[:, 0] + 1)


def _sigmoid_step(steps: Tensor, max_lr: float) -> Tensor:
    return steps.sigmoid() * max_lr


class TitansPytorchMemory(nn.Module):
    """`titans_pytorch.NeuralMemory` 0.5.5 in the paper's form, from the same checkpoints.

        S_t = eta_t S_{t-1} - theta_t grad mean((M(k_t) - v_t)^2)
        W_t = (1 - alpha_t) W_{t-1} + S_t

    Gradients are taken at the weights of the last multiple of batch_size; M is an MLP with GELU.
    The arguments are titans-pytorch's, in its order, and `load_state_dict` takes what its module
    saved. With the same arguments it computes the same, outputs, gradients and states, wherever
    the text is cut. What would be another memory is refused; nothing is ignored.

        chunk_size            1 or (1, 1). With n > 1 tokens share gates and one update there, and
                              read the memory of the chunk before. Nearest here: batch_size=n
        batch_size            an int: `chunk_size` of `neural_memory`, the paper's b. With None
                              all gradients are taken at M_0 there, however long the text
        mem_model_norm_add_residual
                              False. With True the scale of a LayerNorm is learned while reading
                              there; `titans_kernels.NeuralMemory` has one learned in training
        model                 None or its MemoryMLP, whose weights are copied; else
        default_model_kwargs  depth, expansion_factor (2 where only a depth is given)
        adaptive_step_transform, default_step_transform_max_lr
                              the rate of a loss that is a mean: theta of `neural_memory`, whose
                              loss is a sum, is 1 / dim_head of it
        use_accelerated_scan  either: how to compute is the operator's choice
        dim, dim_head, heads, activation, momentum, pre_rmsnorm, post_rmsnorm, qk_rmsnorm,
        per_parameter_lr_modulation, max_mem_layer_modulation, per_head_learned_parameters,
        init_adaptive_step_bias, init_momentum_bias, init_decay_bias
                              as there
        all others            at their defaults; `ONLY` has the reasons

    `init_weights`, `init_momentum`, `retrieve_memories` and `mem_state_detach` are there too;
    `store_memories` and MemoryAsContextTransformer are refused by name.

    Args:
        backend (str): the one argument of ours: "auto", "torch" or "triton".

    Raises:
        ValueError, TypeError: an argument of another form of memory, or one that does not fit, with
            what it got and what it takes.

    Examples:
        >>> import torch
        >>> from titans_kernels.adapt import TitansPytorchMemory as NeuralMemory
        >>> memory = NeuralMemory(64, batch_size=16, mem_model_norm_add_residual=False)
        >>> retrieved, state = memory(torch.randn(2, 100, 64))
        >>> retrieved, state = memory(torch.randn(2, 1, 64), state=state)
        >>> retrieved.shape, state.seq_index
        (torch.Size([2, 1, 64]), 101)
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int | tuple[int, int] = 1,
        batch_size: int | None = None,
        dim_head: int | None = None,
        heads: int = 1,
        model: nn.Module | None = None,
        store_memory_loss_fn: Callable[..., Tensor] | None = None,
        adaptive_step_transform: Callable[[Tensor], Tensor] | None = None,
        default_step_transform_max_lr: float = 1.0,
        per_parameter_lr_modulation: bool = False,
        max_mem_layer_modulation: float = 1.0,
        per_head_learned_parameters: bool = True,
        attn_pool_chunks: bool = False,
        momentum: bool = True,
        momentum_order: int = 1,
        learned_momentum_combine: bool = False,
        learned_combine_include_zeroth: bool = False,
        num_kv_per_token: int = 1,
        qkv_receives_diff_views: bool = False,
        pre_rmsnorm: bool = True,
        post_rmsnorm: bool = False,
        qk_rmsnorm: bool = False,
        max_grad_norm: float | None = None,
        use_accelerated_scan: bool = False,
        activation: nn.Module | None = None,
        init_adaptive_step_bias: float | None = None,
        init_momentum_bias: float | None = None,
        init_decay_bias: float | None = None,
        accept_weight_residual: bool = False,
        spectral_norm_surprises: bool = False,
        gated_transition: bool = False,
        mem_model_norm_add_residual: bool = True,
        store_with_lookahead_value: bool = False,
        default_model_kwargs: dict[str, Any] = {"depth": 2, "expansion_factor": 4.0},  # noqa: B006
        *,
        backend: checks.Backend = "auto",
    ) -> None:
        refuse_others(locals())
        super().__init__()
        checks.integer("dim", dim, 1)
        checks.integer("heads", heads, 1)
        checks.choice("backend", backend, checks.BACKENDS)
        checking.positive("default_step_transform_max_lr", default_step_transform_max_lr)
        checking.positive("max_mem_layer_modulation", max_mem_layer_modulation)
        if chunk_size not in (1, (1, 1)):
            raise ValueError(
                f"chunk_size: got {chunk_size!r}, takes 1: every token has gates of its own; "
                "batch_size says of how many tokens the gradients are taken at the same weights"
            )
        dim_head = dim if dim_head is None else dim_head
        checks.integer("dim_head", dim_head, 1)
        if heads == 1 and dim_head != dim:
            raise ValueError(f"dim_head: got {dim_head}, takes dim = {dim} where heads is 1")
        if init_momentum_bias is not None and not momentum:
            got = init_momentum_bias
            raise ValueError(f"init_momentum_bias: got {got}, takes None without momentum")
        self.dim, self.heads, self.dim_head = dim, heads, dim_head
        self.batch_size, self.backend = _batch_size("batch_size", batch_size), backend
        self.max_mem_layer_modulation = max_mem_layer_modulation
        self.adaptive_step_transform = adaptive_step_transform or partial(
            _sigmoid_step, max_lr=default_step_transform_max_lr
        )

        def linear(d_in: int, d_out: int) -> nn.Linear:
            return nn.Linear(d_in, d_out, bias=False)

        def projection() -> nn.Module:
            bare = linear(dim, heads * dim_head)
            return bare if activation is None else nn.Sequential(bare, activation)

        def gate(bias: float | None = None, per_head: int = 1) -> nn.Sequential:
            layer = nn.Linear(dim, heads * per_head)
            if bias is not None:
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, bias)
            return nn.Sequential(layer)  # its parameters are called 0.weight and 0.bias there

        def head_norm(wanted: bool) -> nn.Module:
            return MultiheadRMSNorm(dim_head, heads) if wanted else nn.Identity()

        self.retrieve_norm = nn.RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.store_norm = nn.RMSNorm(dim) if pre_rmsnorm else nn.Identity()
        self.q_norm, self.k_norm = head_norm(qk_rmsnorm), head_norm(qk_rmsnorm)
        self.multihead_rmsnorm = head_norm(post_rmsnorm)
        self.to_queries, self.to_keys, self.to_values = (projection() for _ in range(3))
        self.retrieve_gate = nn.Sequential(linear(dim, heads)) if heads > 1 else None
        self.combine_heads = linear(heads * dim_head, dim) if heads > 1 else nn.Identity()

        weights = _memory_mlp(model, dim_head, default_model_kwargs)
        if per_head_learned_parameters:
            weights = [w.repeat(heads, 1, 1) for w in weights]
        self.memory_model_parameters = MemoryWeights(weights)

        self.to_adaptive_step = gate(init_adaptive_step_bias)
        self.to_decay_factor = gate(init_decay_bias)
        self.to_momentum = gate(init_momentum_bias) if momentum else None
        self.to_layer_modulation = None
        if per_parameter_lr_modulation:
            self.to_layer_modulation = gate(per_head=len(weights))

    def forward(
        self,
        seq: Tensor,
        store_seq: Tensor | None = None,
        state: NeuralMemState | None = None,
        detach_mem_state: bool = False,
        prev_weights: Any = None,
        store_mask: Tensor | None = None,
        return_surprises: bool = False,
        ttt_batch_size: int | None = None,
    ) -> tuple[Tensor, NeuralMemState]:
        """Train on store_seq and read with seq: token t reads the memory after the update of t.

        Args:
            seq (Tensor): [B, T, dim]; [B, dim] is T = 1.
            store_seq (Tensor | None): [B, T, dim]; with one token of seq any number, after all of
                which it reads. Default: seq.
            state (NeuralMemState | None): what the sequences continue from.
            detach_mem_state (bool): whether the returned state is detached from the graph.
            store_mask (Tensor | None): [B, T] bool; the learning rate is 0 where False.
            ttt_batch_size (int | None): instead of batch_size, from the first token on.
            prev_weights, return_surprises: None and False; others are refused.

        Returns:
            (retrieved, state): [B, T, dim], and what to pass on.
        """
        refuse_others({"prev_weights": prev_weights, "return_surprises": return_surprises})
        seq = seq[:, None] if seq.dim() == 2 else seq
        stored = seq if store_seq is None else store_seq
        chunk_size = self.batch_size
        if ttt_batch_size is not None:
            chunk_size = _batch_size("ttt_batch_size", ttt_batch_size)
        self._check(seq, stored, store_mask, state, chunk_size)

        together = seq.shape[1] == stored.shape[1]
        x, normed = self.store_norm(stored), self.retrieve_norm(seq)
        k, v = self.k_norm(self._heads(self.to_keys(x))), self._heads(self.to_values(x))
        q = self.q_norm(self._heads(self.to_queries(normed)))
        theta, alpha, eta = self._gates(x, store_mask)
        weights = tuple(w.expand(self.heads, -1, -1) for w in self.memory_model_parameters())
        o, memory = neural_memory(
            *(q if together else k, k, v, theta, alpha, eta, weights),
            chunk_size=chunk_size,
            initial_state=None if state is None else state.states,
            output_final_state=True,
            **self._form,
        )
        assert memory is not None
        o = self._output(o if together else retrieve(q, memory, **self._form), normed)
        seen = stored.shape[1] + (0 if state is None else state.seq_index)
        state = NeuralMemState(seen, memory)
        return o, state.detach() if detach_mem_state else state

    @property
    def memory_model_parameter_dict(self) -> dict[str, Tensor]:
        """M_0 by titans-pytorch's names, [heads, d_in, d_out] or [d_in, d_out] for all heads."""
        return {f"weights.{i}": w for i, w in enumerate(self.memory_model_parameters())}

    def init_weights(self, batch: int) -> dict[str, Tensor]:
        """M_0 of `batch` sequences by titans-pytorch's names, [batch * heads, d_in, d_out]."""
        return {
            name: w.expand(batch, self.heads, *w.shape[-2:]).flatten(0, 1)
            for name, w in self.memory_model_parameter_dict.items()
        }

    def init_momentum(self, batch: int) -> dict[str, Tensor]:
        """The momentum of sequences that have not begun, [1, batch * heads, d_in, d_out]."""
        return {name: torch.zeros_like(w)[None] for name, w in self.init_weights(batch).items()}

    def retrieve_memories(self, seq: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Read memories with seq, without an update: [B, T, dim].

        Args:
            seq (Tensor): [B, T, dim].
            weights (dict[str, Tensor]): [B * heads, d_in, d_out] each, as `init_weights` and
                `state.weights` give them; or [B * heads, 1, d_in, d_out]. With weights of its own
                for every token, which are never made here, it is refused.
        """
        B, names = seq.shape[0], list(self.memory_model_parameter_dict)
        self._check(seq, seq, None, None, 1)
        if sorted(weights) != names:
            raise ValueError(f"weights: got {sorted(weights)}, takes {names}")
        matrices = []
        for name in names:
            w = weights[name]
            w = w[:, 0] if w.dim() == 4 and w.shape[1] == 1 else w
            checks.floating(f"weights[{name!r}]", w)
            takes = (B * self.heads, *self.memory_model_parameter_dict[name].shape[-2:])
            checks.shape(f"weights[{name!r}]", w, takes, "[B * heads, d_in, d_out]")
            matrices.append(w.unflatten(0, (B, self.heads)))
        normed = self.retrieve_norm(seq)
        q = self.q_norm(self._heads(self.to_queries(normed)))
        wide = tuple(w.to(torch.promote_types(q.dtype, torch.float32)) for w in matrices)
        nothing, gates = q.new_zeros(B, 1, *q.shape[2:]), q.new_zeros(B, 1, self.heads)
        length = torch.zeros(B, dtype=torch.int32, device=q.device)
        state = MemoryState(wide, wide, nothing, nothing, gates, gates, gates, length)
        return self._output(retrieve(q, state, **self._form), normed)

    def store_memories(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, by name and with what to do instead."""
        refuse_name("store_memories", NotImplementedError)

    @property
    def _form(self) -> dict[str, Any]:
        return {"activation": "gelu", "residual": False, "backend": self.backend}

    def _output(self, o: Tensor, normed: Tensor) -> Tensor:
        o = self.multihead_rmsnorm(o)
        if self.retrieve_gate is not None:
            o = o * self.retrieve_gate(normed).sigmoid()[..., None]
        return self.combine_heads(o.flatten(2))

    def _check(self, seq: Tensor, stored: Tensor, mask: Any, state: Any, chunk_size: int) -> None:
        takes = f"[B, T, dim] with dim = {self.dim}"
        for name, x in (("seq", seq), ("store_seq", stored)):
            if x.dim() != 3 or x.shape[-1] != self.dim:
                raise ValueError(f"{name}: got shape {list(x.shape)}, takes {takes}")
        B, T = stored.shape[:2]
        if seq.shape[0] != B or seq.shape[1] not in (1, T):
            raise ValueError(f"seq: got {list(seq.shape[:2])} tokens, takes {[B, T]} or {[B, 1]}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (B, T)):
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"store_mask: got {got}, takes torch.bool {[B, T]}")
        if state is not None and not isinstance(state, NeuralMemState):
            takes = "None or the NeuralMemState of an earlier call"
            raise TypeError(f"state: got {type(state).__name__}, takes {takes}")
        if state is not None and state.states.chunk_size != chunk_size:
            takes = f"that of the state, {state.states.chunk_size}"
            raise ValueError(f"ttt_batch_size: got {chunk_size}, takes {takes}")

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.heads, self.dim_head))

    def _gates(self, x: Tensor, store_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """theta, alpha and eta: [B, T, H], or [B, T, H, L] with per_parameter_lr_modulation."""
        steps = self.to_adaptive_step(x).transpose(1, 2).flatten(0, 1)  # a transform takes [B H, T]
        rate = self.adaptive_step_transform(steps).unflatten(0, (-1, self.heads)).transpose(1, 2)
        theta = rate / self.dim_head
        if store_mask is not None:
            theta = theta.where(store_mask[..., None], 0.0)
        alpha = self.to_decay_factor(x).sigmoid()
        eta = torch.zeros_like(alpha)
        if self.to_momentum is not None:
            eta = self.to_momentum(x).sigmoid()
        if self.to_layer_modulation is None:
            return theta, alpha, eta
        share = self.to_layer_modulation(x).sigmoid().unflatten(-1, (self.heads, -1))
        theta = theta[..., None] * share * self.max_mem_layer_modulation
        return theta, alpha[..., None].expand_as(theta), eta[..., None].expand_as(theta)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *how: Any) -> None:
        # A template there: its own weights are not used.
        for name in [name for name in state_dict if name.startswith(f"{prefix}memory_model.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *how)

    def extra_repr(self) -> str:
        sizes = f"heads={self.heads}, dim_head={self.dim_head}, batch_size={self.batch_size}"
        return f"{self.dim}, {sizes}"


def _batch_size(name: str, value: Any) -> int:
    # Theirs is None by default, which is another memory; no default of ours would be theirs.
    if value is None:
        raise ValueError(f"{name}: got None, takes an int: the tokens of the paper's chunk")
    checking.state_rows(name, value)
    return value


def _memory_mlp(model: Any, width: int, sizes: dict[str, Any]) -> list[Tensor]:
    """The matrices of a MemoryMLP: of the one given, or new ones."""
    if model is not None:
        if type(model).__name__ != "MemoryMLP":
            raise ValueError(f"model: got {type(model).__name__}, takes None or a MemoryMLP")
        weights = [w.detach().clone() for w in model.weights]
        if (weights[0].shape[0], weights[-1].shape[1]) != (width, width):
            got = [list(w.shape) for w in weights]
            raise ValueError(f"model: got weights {got}, takes a MemoryMLP of dim_head = {width}")
        return weights
    if not {"depth"} <= set(sizes) <= {"depth", "expansion_factor"}:
        takes = "depth and expansion_factor"
        raise ValueError(f"default_model_kwargs: got {', '.join(sizes)}, takes {takes}")
    depth, expansion = sizes["depth"], sizes.get("expansion_factor", 2.0)
    checks.integer("default_model_kwargs depth", depth, 1)
    checking.positive("default_model_kwargs expansion_factor", expansion)
    hidden = int(width * expansion)
    if hidden < 1:
        takes = f"at least 1 / dim_head = {1 / width}"
        raise ValueError(f"default_model_kwargs expansion_factor: got {expansion}, takes {takes}")
    widths = [width, *[hidden] * (depth - 1), width]
    return [nn.init.xavier_uniform_(torch.empty(shape)) for shape in pairwise(widths)]
