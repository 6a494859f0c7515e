"""The check: the kernels and the definition on a small problem of the sizes that will be used.

The judge is the PyTorch backend in float64, on the same device and the same rounded inputs; bounds
are those of `python -m titans_kernels.verify`. Backends are called as the custom ops call them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..comparison import bounds, worst_error, worst_factor
from ..packing import Options, Packed, Reading
from ..stepping import Projected, Step, StepState, StepWeights
from .configuration import Configuration

MOST_STEPS = 16  # tokens decoded
# Gates that a problem has, at least, by more sequences where they are short: the factor between two
# gradients is lost in the noise of too few. More sequences than this would take memory only.
GATES, MOST_SEQUENCES = 1024, 48

Named = dict[str, Tensor]
Results = dict[str, Named]  # by kind, "forward" and "gradient", and name


class Failure(NamedTuple):
    """What was not within its bound."""

    tensor: str
    error: float
    bound: float

    def __str__(self) -> str:
        return f"{self.tensor} has an error of {self.error:.1e}, its bound is {self.bound:.1e}"


def check(configuration: Configuration, heads: int, device: torch.device) -> Failure | None:
    """Run the kernels, forward and, with gradients, backward. None: all is within its bounds."""
    run, problem = _KINDS[configuration.operator]
    x = problem(configuration, heads, device)
    found = run(_backend("kernels"), configuration, x)
    wanted = run(_backend("chunked"), configuration, _cast(x, torch.float64))
    return judge(found, wanted, configuration)


def judge(found: Results, wanted: Results, configuration: Configuration) -> Failure | None:
    """What is furthest over its bound."""
    dtype = getattr(torch, configuration.dtype)
    limit = bounds(dtype, configuration.tokens, configuration.precision == "tf32")
    failures = []
    for kind, references in wanted.items():
        wide = {name: x.double() for name, x in found[kind].items()}
        allowed = limit.forward if kind == "forward" else limit.gradient
        worst, factor = worst_error(wide, references), worst_factor(wide, references)
        if worst is not None and not worst.error <= allowed:
            failures.append(Failure(worst.name, worst.error, allowed))
        if factor is not None and not factor.error <= limit.factor:
            name = f"the factor between {factor.name} and what it should be"
            failures.append(Failure(name, factor.error, limit.factor))
    return max(failures, key=lambda x: x.error / x.bound, default=None)


def _backend(name: str) -> ModuleType:
    return importlib.import_module(f"titans_kernels.{name}.operator")


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """The same record, what is floating in another dtype."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, list):
        return [_cast(part, dtype) for part in x]
    return None if x is None else type(x)(*(_cast(part, dtype) for part in x))


# ---------------------------------------------------------------------------------------- running


def _options(configuration: Configuration) -> Options:
    return Options(configuration.activation, configuration.residual, configuration.read)


def _memory(backend: ModuleType, configuration: Configuration, x: Packed) -> Results:
    how = _options(configuration), configuration.chunk_size, configuration.tokens
    state = [*x.weights, *x.momentum]
    kept = []
    if configuration.gradients:
        kept = [state[0].new_zeros(s) for s in backend.kept_shapes(x, configuration.chunk_size)]
    o, final = backend.forward(x, *how, kept, True)
    results = {"forward": {"o": o} | _per_layer("final", len(x.weights), final)}
    if configuration.gradients:
        random = _random(1, x.q.device)
        do = random(*o.shape).to(_rounded(configuration)).to(o.dtype)
        dfinal = [random(*w.shape).to(w.dtype) / w.shape[-1] for w in state]
        results["gradient"] = _gradients(x, backend.backward(x, *how, kept, do, dfinal))
    return results


def _reading(backend: ModuleType, configuration: Configuration, x: Reading) -> Results:
    how = _options(configuration), configuration.tokens
    o = backend.retrieve(x, *how)
    do = _random(1, x.q.device)(*o.shape).to(_rounded(configuration)).to(o.dtype)
    grads = backend.retrieve_backward(x, *how, do)
    return {"forward": {"o": o}, "gradient": _gradients(x, grads)}


def _step(backend: ModuleType, configuration: Configuration, x: Step) -> Results:
    """Token after token, where chunks are short past the end of one in every sequence."""
    x, outputs = pytree.tree_map(torch.clone, x), []
    for i in range(min(configuration.chunk_size, MOST_STEPS) + 1):
        token = pytree.tree_map(lambda y, i=i: y.roll(i, 0), x.projected)
        outputs.append(backend.step(x._replace(projected=token), _options(configuration), 0.1))
    depth = len(x.state.memory) // 2
    return {"forward": {"o": torch.stack(outputs)} | _per_layer("final", depth, x.state.memory)}


def _rounded(configuration: Configuration) -> torch.dtype:
    """The dtype that inputs of all runs are rounded to."""
    dtype: torch.dtype = getattr(torch, configuration.dtype)
    return dtype


def _per_layer(prefix: str, depth: int, tensors: list[Tensor]) -> Named:
    names = [f"{prefix} {kind}[{i}]" for kind in ("weights", "momentum") for i in range(depth)]
    return dict(zip(names, tensors, strict=True))


def _gradients(x: Packed | Reading, grads: list[Tensor]) -> Named:
    """By name, as `differentiable` has them in order."""
    names = []
    for name, field in zip(x._fields, x, strict=True):
        if isinstance(field, list):
            names += [f"{name}[{i}]" for i in range(len(field))]
        elif field is not None and field.is_floating_point():
            names.append(name)
    return dict(zip((f"gradient of {name}" for name in names), grads, strict=True))


# ---------------------------------------------------------------------------------------- problems

Random = Callable[..., Tensor]


def _random(seed: int, device: torch.device, uniform: bool = False) -> Random:
    """Float64 numbers of its own sequence, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    make = torch.rand if uniform else torch.randn

    def random(*shape: int) -> Tensor:
        return make(shape, generator=generator, dtype=torch.float64, device="cpu").to(device)

    return random


def _memory_problem(configuration: Configuration, heads: int, device: torch.device) -> Packed:
    """Sequences by threes: a new one, one that goes on in mid-chunk, one of a single token.

    Unit q, k and v, and a LayerNorm whose output has v's norm; theta is as large as leaves the
    memory's dynamics from amplifying differences, so that what was learned is a good part of o.
    """
    dtype = _rounded(configuration)
    wide = torch.promote_types(dtype, torch.float32)
    D, L = configuration.head_dim, configuration.depth if configuration.per_layer else 1
    three = torch.tensor([configuration.tokens, configuration.tokens // 2 + 1, 1])
    threes = min(ceil(GATES / (int(three.sum()) * heads)), MOST_SEQUENCES // 3)
    lengths, behind = (
        three.repeat(threes),
        min(configuration.chunk_size - 1, configuration.tokens // 3),
    )
    tail = torch.tensor([0, behind, 0]).repeat(threes)
    end, queries = lengths.cumsum(0), lengths - tail
    bounds = torch.stack([end - lengths, end], 1)
    M, Mq = int(lengths.sum()), int(queries.sum())
    random, uniform = _random(0, device), _random(2, device, uniform=True)

    def unit(rows: int) -> Tensor:
        return F.normalize(random(rows, heads, D), dim=-1).to(dtype)

    theta, alpha, eta = (
        (largest * uniform(M, heads, L)).to(getattr(torch, name))
        for largest, name in zip((0.1, 0.05, 0.9), configuration.gates.split(","), strict=True)
    )
    weights = _matrices(configuration, random, len(lengths), heads)
    momentum = [0.1 * w for w in _matrices(configuration, random, len(lengths), heads)]
    for x in momentum:
        x[::3] = 0.0
    return Packed(
        *(unit(Mq), unit(M), unit(M), theta, alpha, eta),
        *([x.to(wide) for x in weights], [x.to(wide) for x in momentum]),
        _norm(configuration, random, heads, wide),
        *(x.to(device) for x in (bounds, tail, queries.cumsum(0) - queries)),
    )


def _reading_problem(configuration: Configuration, heads: int, device: torch.device) -> Reading:
    """The queries of two sequences."""
    dtype = _rounded(configuration)
    wide = torch.promote_types(dtype, torch.float32)
    lengths, random = [configuration.tokens, configuration.tokens // 2 + 1], _random(0, device)
    q = F.normalize(random(sum(lengths), heads, configuration.head_dim), dim=-1).to(dtype)
    weights = [x.to(wide) for x in _matrices(configuration, random, 2, heads)]
    cu = torch.tensor([0, lengths[0], sum(lengths)], device=device)
    return Reading(q, weights, _norm(configuration, random, heads, wide), cu)


def _step_problem(configuration: Configuration, heads: int, device: torch.device) -> Step:
    """One token of three sequences: with an empty chunk, half a chunk, all but its last token."""
    dtype, C, D = _rounded(configuration), configuration.chunk_size, configuration.head_dim
    wide, L = torch.promote_types(dtype, torch.float32), 1
    if configuration.per_layer:
        L = configuration.depth
    random, uniform = _random(0, device), _random(2, device, uniform=True)
    length = torch.tensor([0, C // 2, C - 1], dtype=torch.int32, device=device)
    there = (torch.arange(C, device=device) < length[:, None])[:, :, None, None]

    def some(*shape: int) -> Tensor:
        return random(*shape).to(dtype)

    tokens = [F.normalize(some(3, C, heads, D), dim=-1) * there for _ in range(2)]
    for largest, name in zip((0.1, 0.05, 0.9), configuration.gates.split(","), strict=True):
        rate = largest * uniform(3, C, heads, L) * there
        tokens.append(rate.to(getattr(torch, name)))
    weights, momentum = (_matrices(configuration, random, 3, heads) for _ in range(2))
    memory = [x.to(wide) for x in (*weights, *(0.1 * x for x in momentum))]
    norm, taps = _norm(configuration, random, heads, dtype), configuration.taps
    return Step(
        Projected(
            some(3, heads * D),
            [some(3, heads * D) for _ in range(3)],
            [some(3, heads * L) for _ in range(3)],
        ),
        StepWeights(
            [some(heads * D, taps) / taps**0.5 for _ in range(3 if taps else 0)],
            [some(heads * L) for _ in range(3)],
            [] if norm is None else list(norm.unbind(1)),
            some(heads, D),
        ),
        StepState(
            [some(3, taps - 1, heads * D) for _ in range(3 if taps else 0)], tokens, length, memory
        ),
    )


def _matrices(
    configuration: Configuration, random: Random, sequences: int, heads: int
) -> list[Tensor]:
    D, hidden = configuration.head_dim, configuration.hidden
    widths = [D, *map(int, hidden.split(",") if hidden else ()), D]
    return [random(sequences, heads, m, n) / m**0.5 for m, n in pairwise(widths)]


def _norm(
    configuration: Configuration, random: Random, heads: int, dtype: torch.dtype
) -> Tensor | None:
    if not configuration.norm:
        return None
    D = configuration.head_dim
    weight, bias = 1 + 0.1 * random(heads, D), 0.1 * random(heads, D)
    return (torch.stack([weight, bias], 1) / D**0.5).to(dtype)


_KINDS: dict[str, tuple[Callable[..., Results], Callable[..., Any]]] = {
    "neural_memory": (_memory, _memory_problem),
    "retrieve": (_reading, _reading_problem),
    "step": (_step, _step_problem),
}
