"""States past the hooks that cast what a module is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..state import State


class _Sealed:
    """A state that no hook looks into: not a pytree."""

    def __init__(self, state: Any) -> None:
        self.state = state


def unsealed(state: Any) -> Any:
    """What a module's caller passed as its state."""
    return state.state if isinstance(state, _Sealed) else state


def _is_unit_of_fsdp2(module: nn.Module) -> bool:
    return hasattr(type(module), "set_requires_gradient_sync")


def lasting(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight that a module returns: a copy where FSDP frees it as soon as the call is over."""
    freed = _is_unit_of_fsdp2(module) or getattr(module, "_is_fsdp_managed_module", False)
    return weight.clone() if freed else weight


class Sealing(nn.Module):
    """A module whose `forward` gets a state as its caller passed it.

    FSDP2 casts every floating-point tensor in a module's arguments to its param_dtype
    (`cast_forward_inputs`, its default): a float32 memory would be rounded to bfloat16 at every
    call. Only the arguments are sealed: in the outputs FSDP2 must find the tensors that backward
    starts from.
    """

    def __call__(self, *args: Any, **named: Any) -> Any:
        if _is_unit_of_fsdp2(self):
            args = tuple(_Sealed(x) if isinstance(x, State) else x for x in args)
            named = {k: _Sealed(x) if isinstance(x, State) else x for k, x in named.items()}
        return super().__call__(*args, **named)
