"""`TitansMAC`'s loop over segments under torch.compile. Imported while tracing: it needs Dynamo."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from .mac import TitansMAC


def graphs_may_break() -> bool:
    """Whether torch.compile is tracing without `fullgraph=True`."""
    return not torch.compiler.is_exporting() and not _whole_graph()


@torch.compiler.assume_constant_result
def _whole_graph() -> bool:
    """Asked of Dynamo, which has no public way to. Where it has moved it, graphs are whole."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return bool(InstructionTranslator.current_tx().one_graph)
    except (ImportError, AttributeError):
        return True


def _outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, run by Python where torch.compile calls it; what it calls is compiled.

    A loop in it is then no part of a graph, which would be another one for each number of turns.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_outside_of_graphs")
    copied = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__)
    return torch.compiler.disable(functools.wraps(function)(copied), recursive=False)


read_alike = _outside_of_graphs(TitansMAC._read_alike)
