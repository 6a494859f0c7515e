"""A model on all processes of a mesh, by FSDP2 and the styles of `titans_kernels.distributed`."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from ..distributed import ReplicateHeads, ShardHeads, ShardLength
from ..models import TitansForCausalLM
from .processes import Processes

MIXERS = "model.layers.*.mixer"


def shard(model: TitansForCausalLM, processes: Processes) -> None:
    """Heads first, then the length; FSDP2 shards what each process has left of the parameters."""
    mesh = processes.mesh
    if mesh is None:
        return
    if processes.place("heads")[1] > 1:
        parallelize_module(model, mesh["heads"], {MIXERS: ShardHeads()})
        parallelize_module(model, mesh["heads"], ReplicateHeads())
    if processes.place("length")[1] > 1:
        parallelize_module(model, mesh["length"], {MIXERS: ShardLength(state="all")})
    shards = mesh["data", "length"]._flatten("shards")
    for layer in model.model.layers:
        fully_shard(layer, mesh=shards)
    fully_shard(model, mesh=shards)


def reshard(model: TitansForCausalLM) -> None:
    """After a forward pass without a backward pass, which would have done it."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def save_model(model: TitansForCausalLM, folder: Any, processes: Processes) -> None:
    """As `save_pretrained` of one process."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors = get_model_state_dict(model, options=whole) if processes.count > 1 else None
    if processes.first:
        if tensors is not None:  # tied ones once
            named = dict([*model.named_parameters(), *model.named_buffers()])
            tensors = {name: x for name, x in tensors.items() if name in named}
        model.save_pretrained(folder, state_dict=tensors)
