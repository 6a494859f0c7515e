"""Tensor parallelism: every rank has some of the heads, and all of the tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle

from .. import checks
from ..decay import Undecayed
from ..layers import NeuralMemory
from ..layers.attention import Attention
from ..layers.block import Block
from ..layers.convolution import ShortConvolution
from .agreement import agree_together
from .messages import Line

# Arguments of the layers with heads that are tokens: the same on all ranks.
_TOKENS = ("x", "retrieved", "prefix")
_SEQUENCE = 1  # the dimension of x


class ShardHeads(ParallelStyle):
    """Shard a Titans layer over its heads: tensor parallelism.

    Every rank of the mesh has its share of the heads: their projections, convolutions, gates,
    memories and norms, and in a block those of the attention. `out_proj` is row-wise: its products
    are summed over the ranks by one all-reduce, and so is the gradient of the layer's input. What
    has no heads (persistent tokens, the norms of a block's gate) is replicated. All parameters are
    DTensors: apply `fully_shard` afterwards, over another dimension of the mesh, and save and load
    them by torch.distributed.checkpoint on any mesh.

    Input and output are the same [B, T, dim] on all ranks. The state is each rank's own: that of
    its heads.

    Args:
        sequence_parallel (bool): whether input and output are instead every rank's T / R tokens,
            as many on each, for norms between the layers that work on a share of the tokens. The
            input is gathered and, in a `NeuralMemory`, the output reduce-scattered; in a block it
            is reduced and divided. Default: False.

    Raises:
        TypeError: for a module that is neither a `NeuralMemory` nor a Titans block.
        ValueError: for heads that the ranks do not divide, or parameters that are sharded already;
            in a call, if ranks differ in options, shapes or dtypes, naming both and what they have.

    Examples:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from titans_kernels import NeuralMemory
        >>> from titans_kernels.distributed import ShardHeads
        >>> # One process; under torchrun `dist.init_process_group()`.
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("heads",))
        >>> layer = parallelize_module(NeuralMemory(64, heads=4), mesh["heads"], ShardHeads())
        >>> out, state = layer(torch.randn(1, 100, 64))
        >>> dist.destroy_process_group()
    """

    def __init__(self, *, sequence_parallel: bool = False) -> None:
        checks.boolean("sequence_parallel", sequence_parallel)
        self.sequence_parallel = sequence_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, device_mesh)
        for part in module.modules():
            self._distribute(part, device_mesh, owner=_owner(module, part))
        for part in module.modules():
            if isinstance(part, (NeuralMemory, Attention)):
                scattered = self.sequence_parallel and part is module
                _exchange(part, device_mesh, scattered)
        if self.sequence_parallel and isinstance(module, Block):
            _divide_tokens(module, device_mesh)
        module._sharding = {"sequence_parallel": self.sequence_parallel}  # type: ignore[assignment]
        _agree(module, Line(device_mesh.get_group()))
        return module

    def _distribute(self, part: nn.Module, mesh: DeviceMesh, owner: nn.Module | None) -> None:
        """The module's own parameters as DTensors, which it reads as its rank's tensors."""
        if isinstance(part, (NeuralMemory, Attention, Block)):
            part.heads //= mesh.size()
        elif isinstance(part, ShortConvolution):
            part.channels //= mesh.size()
        own = dict(part.named_parameters(recurse=False))
        for name, parameter in own.items():
            where: Placement = Replicate()
            if owner is not None:
                where = Shard(1) if part is owner.out_proj else Shard(0)
            part.register_parameter(name, _as_dtensor(parameter, mesh, where, self.src_data_rank))
        if isinstance(part, Undecayed):
            part.mark_undecayed()
        if own:
            _read_locally(part)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sequence_parallel={self.sequence_parallel})"


class ReplicateHeads(ParallelStyle):
    """Replicate what has no heads, over the ranks that share the heads of other layers.

    For a model whose Titans layers `ShardHeads` has sharded. All its parameters are then DTensors
    of one mesh, which optimizers and `clip_grad_norm_` take together. All ranks compute the same.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        once: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
        for part in module.modules():
            own = {n: p for n, p in part.named_parameters(recurse=False) if _is_plain(p)}
            for name, parameter in own.items():
                if parameter not in once:
                    once[parameter] = _as_dtensor(
                        parameter, device_mesh, Replicate(), self.src_data_rank
                    )
                part.register_parameter(name, once[parameter])
            if own:
                _read_locally(part)
        return module


def _is_plain(x: Tensor) -> bool:
    return not isinstance(x, DTensor)


def _as_dtensor(
    parameter: nn.Parameter, mesh: DeviceMesh, where: Placement, source: int | None
) -> nn.Parameter:
    shared = distribute_tensor(parameter.detach(), mesh, [where], src_data_rank=source)
    return nn.Parameter(shared, parameter.requires_grad)


def _check(module: nn.Module, mesh: DeviceMesh) -> None:
    if not isinstance(module, (NeuralMemory, Block)):
        got = type(module).__name__
        raise TypeError(f"module: got {got}, takes a NeuralMemory or a Titans block")
    if module.heads % mesh.size():
        raise ValueError(
            f"heads: got {module.heads}, takes a multiple of the {mesh.size()} ranks of the mesh"
        )
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name}: got a DTensor, takes a tensor; ShardHeads comes first, before fully_shard"
            )


def _owner(module: nn.Module, part: nn.Module) -> Any:
    """The layer with heads whose parameters these are, if there is one."""
    for layer in module.modules():
        if isinstance(layer, (NeuralMemory, Attention)) and any(p is part for p in layer.modules()):
            return layer
    return None


def _read_locally(module: nn.Module) -> None:
    """While the module runs, its DTensors are this rank's tensors; FSDP2 has gathered them then."""
    kept: list[dict[str, nn.Parameter | None]] = []

    def enter(module: nn.Module, args: Any) -> None:
        kept.append(dict(module._parameters))
        for name, x in kept[-1].items():
            if isinstance(x, DTensor):
                module._parameters[name] = x.to_local()

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if kept:  # not where a hook before `enter` has failed
            module._parameters.update(kept.pop())

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)


def _agree(module: nn.Module, line: Line) -> None:
    """Before every call; where the ranks can talk by their GPUs alone, before the first."""
    signature, calls = inspect.signature(module.forward), count()

    def enter(module: nn.Module, args: Any, named: Any) -> None:
        if line.on_cpu or next(calls) == 0:
            agree_together(line, module, dict(signature.bind(*args, **named).arguments))

    module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)


def _exchange(layer: NeuralMemory | Attention, mesh: DeviceMesh, scattered: bool) -> None:
    """Gradients of a layer's tokens are summed over the ranks, and so are its outputs.

    Args:
        scattered: whether tokens are divided among the ranks outside of the layer.
    """
    outside: Placement = Shard(_SEQUENCE) if scattered else Replicate()

    def enter(x: Tensor) -> Tensor:
        shared = DTensor.from_local(x, mesh, [outside], run_check=False)
        return shared.redistribute(mesh, [Replicate()]).to_local(grad_placements=[Partial()])

    def leave(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        shared = DTensor.from_local(out, mesh, [Partial()], run_check=False)
        return shared.redistribute(mesh, [outside]).to_local()

    _before(layer, enter)
    layer.out_proj.register_forward_hook(leave)


def _divide_tokens(block: Block[Any], mesh: DeviceMesh) -> None:
    """The tokens of a block, which reads all of them, are divided among the ranks outside of it."""

    def enter(x: Tensor) -> Tensor:
        shared = DTensor.from_local(x, mesh, [Shard(_SEQUENCE)], run_check=False)
        return shared.redistribute(mesh, [Replicate()]).to_local()

    def leave(module: nn.Module, args: Any, out: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        whole = DTensor.from_local(out[0], mesh, [Replicate()], run_check=False)
        return whole.redistribute(mesh, [Shard(_SEQUENCE)]).to_local(), out[1]

    _before(block, enter)
    block.register_forward_hook(leave)


def _before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change those arguments of `forward` that are tokens."""
    signature = inspect.signature(module.forward)

    def enter(module: nn.Module, args: Any, named: Any) -> tuple[tuple[()], dict[str, Any]]:
        found = dict(signature.bind(*args, **named).arguments)
        for name in _TOKENS:
            if isinstance(found.get(name), Tensor):
                found[name] = change(found[name])
        return (), found

    module.register_forward_pre_hook(enter, with_kwargs=True)
