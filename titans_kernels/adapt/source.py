"""What a module returns, adds and hides, read from the source of its forward.

A module that takes another's place has to return the same form. A signature does not have it, and a
host's attention cannot be called to find out: it needs rotary embeddings, masks, caches.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

Form = tuple[str, ...] | None  # names of what is returned in a tuple; None is a bare tensor


def returned(module: nn.Module) -> Form:
    """The names of the elements of the tuple that forward returns, "" where it has none."""
    return _returned_by(type(module).forward, module)


def adds_its_input(module: nn.Module) -> bool:
    """Whether the residual is part of the module: x + f(x), or a layer inside adds x to f(x)."""
    return _adds(module, 1)


def hiding(module: nn.Module) -> frozenset[str]:
    """The arguments that forward fills scores under, as they come: masks of what is hidden."""
    tree = _tree(type(module).forward)
    if tree is None:
        return frozenset()
    names = {argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs)}
    found, changed = set(), set()
    for node in _own(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            changed.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            under = node.args[0]
            if node.func.attr.startswith("masked_fill") and isinstance(under, ast.Name):
                found.add(under.id)
    return frozenset(found & names - changed)


def _adds(module: nn.Module, place: int) -> bool:
    """Whether forward adds the argument in this place to something."""
    tree = _tree(type(module).forward)
    if tree is None or len(tree.args.args) <= place:
        return False
    aliases = {tree.args.args[place].arg}
    for node in _own(tree):
        if isinstance(node, ast.Assign) and _is_name(node.value, aliases):
            aliases |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    for node in _own(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            if _is_name(node.left, aliases) or _is_name(node.right, aliases):
                return True
        # Layers such as BERT's, self.output(attended, hidden_states).
        elif isinstance(node, ast.Call) and len(node.args) == 2 and _is_part(node.func):
            part = getattr(module, node.func.attr, None)  # type: ignore[attr-defined]
            if _is_name(node.args[1], aliases) and isinstance(part, nn.Module) and _adds(part, 2):
                return True
    return False


def tried(module: nn.Module, dim: int) -> Form:
    """As `returned`, of a module that takes x alone: by a call of its copy without storage."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare) if isinstance(tensor, nn.Parameter) else bare
    names = returned(module)
    try:
        with torch.no_grad():
            found = copy.deepcopy(module, memo)(torch.empty(1, 2, dim, device="meta"))
    except Exception:  # it reads values, or is more than a function of x
        return names
    if isinstance(found, torch.Tensor):
        return None
    if not isinstance(found, tuple):
        raise TypeError(f"returns a {type(found).__name__}, takes a tensor or a tuple")
    known = names if names is not None and len(names) == len(found) else ("",) * len(found)
    return tuple("" if x is None else name for x, name in zip(found, known, strict=True))


def _returned_by(function: Callable[..., Any], module: nn.Module) -> Form:
    tree = _tree(function)
    if tree is None:
        return None
    forms = [
        _form(node.value, tree, module, set())
        for node in _own(tree)
        if isinstance(node, ast.Return) and node.value is not None
    ]
    return max((form for form in forms if form is not None), key=len, default=None)


def _form(value: ast.expr, tree: ast.FunctionDef, module: nn.Module, open_: set[str]) -> Form:
    """The form of an expression; open_: the names that are being looked up."""
    if isinstance(value, ast.Tuple):
        return tuple(_name(element) for element in value.elts)
    if isinstance(value, ast.IfExp):
        forms = [_form(branch, tree, module, open_) for branch in (value.body, value.orelse)]
        return max((form for form in forms if form is not None), key=len, default=None)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        left, right = (_form(side, tree, module, open_) for side in (value.left, value.right))
        return None if left is None and right is None else (*(left or ()), *(right or ()))
    if isinstance(value, ast.Name) and value.id not in open_:
        return _form_of_name(value.id, tree, module, open_ | {value.id})
    if isinstance(value, ast.Call) and _is_part(value.func):
        part = getattr(module, value.func.attr, None)  # type: ignore[attr-defined]
        if isinstance(part, nn.Module):
            return returned(part)
        if inspect.ismethod(part):
            return _returned_by(part.__func__, module)
    return None


def _form_of_name(name: str, tree: ast.FunctionDef, module: nn.Module, open_: set[str]) -> Form:
    form: Form = None
    for node in _own(tree):
        if isinstance(node, ast.Assign) and any(_is_name(t, {name}) for t in node.targets):
            found = _form(node.value, tree, module, open_)
            # outputs = outputs + (weights,) continues what outputs is
            continues = any(_is_name(x, {name}) for x in ast.walk(node.value))
            if found is not None:
                form = (*(form or ()), *found) if continues else max(form or (), found, key=len)
        elif isinstance(node, ast.AugAssign) and _is_name(node.target, {name}):
            form = (*(form or ()), *(_form(node.value, tree, module, open_) or ())) or None
    return form


def _tree(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        source = inspect.getsource(inspect.unwrap(function))
        tree = ast.parse(textwrap.dedent(source)).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _own(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function in the order of its text, without those of functions inside it."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield node
            yield from _own(node)


def _is_name(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _is_part(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and _is_name(node.value, {"self"})


def _name(element: ast.expr) -> str:
    return element.id if isinstance(element, ast.Name) else ""
