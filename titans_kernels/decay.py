"""Which parameters weight decay leaves alone."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn


class Undecayed(nn.Module):
    """A module that names its own parameters that weight decay must not shrink.

    They carry `_no_weight_decay = True` as well, for optimizers that look for it. Copies have it
    too; FSDP2 makes other parameters without it, which keep their names.
    """

    undecayed: ClassVar[tuple[str, ...]] = ()

    def mark_undecayed(self) -> None:
        for name in self.undecayed:
            parameter = getattr(self, name)
            if parameter is not None:
                parameter._no_weight_decay = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.mark_undecayed()  # a deep copy of a parameter has none of its attributes


def no_weight_decay(model: nn.Module) -> set[str]:
    """The names of the parameters that weight decay must not shrink.

    These are the gates' biases, the scales and shifts of normalisations, and the gate of a memory
    next to attention. Decay would pull a normalisation's scale from where it starts to 0.

    Args:
        model (nn.Module): any model, with Titans layers or without; also deep copied, sharded by
            FSDP2, wrapped or replaced in.

    Returns:
        Names as `model.named_parameters(remove_duplicate=False)` has them.

    Examples:
        >>> from titans_kernels import NeuralMemory, no_weight_decay
        >>> sorted(no_weight_decay(NeuralMemory(64, heads=2)))[:2]
        ['alpha_bias', 'eta_bias']
    """
    found = set()
    for prefix, module in model.named_modules(remove_duplicate=False):
        names = module.undecayed if isinstance(module, Undecayed) else ()
        for name, parameter in module.named_parameters(recurse=False):
            if name in names or getattr(parameter, "_no_weight_decay", False):
                found.add(f"{prefix}.{name}" if prefix else name)
    return found


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, with weight decay for matrices only.

    Vectors and the parameters of `no_weight_decay` are in a group without decay. The `Trainer` of
    transformers chooses by patterns of names, which miss some of ours; give it the optimizer:
    `Trainer(model, args, optimizers=(AdamW(parameter_groups(model, 0.1), lr=1e-3), None))`.

    Args:
        model (nn.Module): after sharding, where it is sharded.
        weight_decay (float): of the matrices.

    Examples:
        >>> import torch
        >>> from titans_kernels import NeuralMemory, parameter_groups
        >>> groups = parameter_groups(NeuralMemory(64, heads=2), 0.1)
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    exempt = no_weight_decay(model)
    named = list(model.named_parameters(remove_duplicate=False))
    apart = {id(p) for name, p in named if p.dim() < 2 or name in exempt}
    groups: tuple[list[Tensor], list[Tensor]] = [], []
    for parameter in model.parameters():
        groups[id(parameter) in apart].append(parameter)
    decayed, others = groups
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
