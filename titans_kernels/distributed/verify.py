"""Do sharded layers on this cluster compute what one process does? Run by `titans_kernels.verify`.

Every layer is read by one process and by all of them together, sharded over its heads, over the
length of the sequences and over both: outputs, and gradients of the input and of all parameters.
An error is ||x - y|| / ||y||, of the worst tensor on the worst rank, where y is one process in
float64. In lower precision the bound is three times the error of one process in that precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from ..layers import NeuralMemory, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from .heads import ShardHeads
from .length import ShardLength

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
EXACT = 1e-11, 1e-10  # outputs and gradients in float64
FACTOR = 3.0
MOST_HEADS = 8  # ranks that share the heads
DIM, HEAD_DIM, TOKENS = 32, 16, 13  # tokens of a rank: no border is one of a chunk or a window

ROW = "{:<13}  {:<19}  {:<8}  {:>7}  {:>7}  {:<36}  {:>7}  {}"
HEADER = ROW.format(
    "layer", "ranks", "dtype", "output", "bound", "worst gradient", "bound", "verdict"
)


class Found(NamedTuple):
    """What a layer computed of these tokens: those of a rank, or all."""

    out: Tensor
    gradients: dict[str, Tensor]


def layers(heads: int) -> dict[str, Callable[[torch.dtype], nn.Module]]:
    def of(cls: Any, **options: Any) -> Callable[[torch.dtype], nn.Module]:
        def make(dtype: torch.dtype) -> nn.Module:
            torch.manual_seed(0)
            return cls(DIM, heads=heads, dim_head=HEAD_DIM, **options).to(dtype)

        return make

    return {
        "NeuralMemory": of(NeuralMemory),
        "TitansMAC": of(TitansMAC, segment=11),
        "TitansMAG": of(TitansMAG, window=11),
        "TitansMAL": of(TitansMAL, window=11),
        "TitansTNT": of(TitansTNT, global_chunk=11, local_chunks=(4,), reset_every=10),
    }


def main(device: str, backends: tuple[str, ...]) -> int:
    """The table; returns the exit code, on every rank."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        return _table(device, backends)
    finally:
        dist.destroy_process_group()


def _table(device: str, backends: tuple[str, ...]) -> int:
    first, failed, compared = dist.get_rank() == 0, 0, 0
    if first:
        print(f"\n{HEADER}", flush=True)
    for mesh in _meshes(device):
        for name, make in layers(2 * mesh["heads"].size()).items():
            exact = None
            for dtype in DTYPES:
                for backend in backends:
                    if dtype == torch.float64 and backend == "triton":  # which takes none on a GPU
                        continue
                    exact = exact or _read(make(torch.float64), _tokens(mesh, torch.float64))
                    row, good = _compare(name, make, mesh, dtype, backend, exact)
                    compared, failed = compared + 1, failed + (not good)
                    if first:
                        print(row, flush=True)
    if first:
        verdict = f"{failed} FAIL" if failed else "all ok"
        print(f"\n{compared} comparisons with one process: {verdict}")
    return int(failed > 0)


def _meshes(device: str) -> list[DeviceMesh]:
    """All ranks over heads, as far as they go, over the length, and over both."""
    count = dist.get_world_size()
    most = max(n for n in range(1, MOST_HEADS + 1) if count % n == 0)
    some = [n for n in range(2, most + 1) if count % n == 0 and n < count][:1]
    heads = dict.fromkeys([most, 1, *some])
    names = ("length", "heads")
    return [init_device_mesh(device, (count // n, n), mesh_dim_names=names) for n in heads]


def _tokens(mesh: DeviceMesh, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS * mesh["length"].size(), DIM, generator=generator)
    return x.to(mesh.device_type, dtype)


def _compare(
    name: str,
    make: Callable[[torch.dtype], nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    backend: Any,  # a choice of the command line
    exact: Found,
) -> tuple[str, bool]:
    x, one = _tokens(mesh, dtype), make(dtype).to(mesh.device_type)
    for part in one.modules():
        if isinstance(part, NeuralMemory):
            part.backend = backend
    many = copy.deepcopy(one)
    out, worst, gradient = _errors(_together(many, x, mesh), exact, mesh)
    bounds = EXACT
    if dtype != torch.float64:
        alone = _errors(_read(one, x), exact, mesh)
        bounds = FACTOR * alone[0], FACTOR * alone[2]
    good = out <= bounds[0] and gradient <= bounds[1]
    ranks = f"{mesh['heads'].size()} heads x {mesh['length'].size()} length"
    row = ROW.format(
        *(name, ranks, str(dtype).removeprefix("torch."), f"{out:.1e}", f"{bounds[0]:.1e}"),
        *(f"{gradient:.1e} {worst}", f"{bounds[1]:.1e}", "ok" if good else "FAIL"),
    )
    return row, good


def _read(layer: nn.Module, x: Tensor) -> Found:
    layer.to(x.device)
    x = x.clone().requires_grad_()
    out, _ = layer(x)
    out.double().square().sum().backward()
    named = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    return Found(out.detach(), {n: g for n, g in named.items() if g is not None})


def _together(layer: nn.Module, x: Tensor, mesh: DeviceMesh) -> Found:
    """Sharded, then put together again."""
    length = mesh["length"]
    if mesh["heads"].size() > 1:
        parallelize_module(layer, mesh["heads"], ShardHeads())
    if length.size() > 1:
        parallelize_module(layer, length, ShardLength())
    found = _read(layer, x.chunk(length.size(), 1)[length.get_local_rank()])
    gradients = {}
    for name, g in found.gradients.items():
        g = g.full_tensor() if isinstance(g, DTensor) else g
        if name != "x":
            dist.all_reduce(g, group=length.get_group())
        gradients[name] = g if name != "x" else _joined(g, length)
    return Found(_joined(found.out, length), gradients)


def _joined(own: Tensor, length: DeviceMesh) -> Tensor:
    parts = [torch.empty_like(own) for _ in range(length.size())]
    dist.all_gather(parts, own.contiguous(), group=length.get_group())
    return torch.cat(parts, 1)


def _errors(found: Found, exact: Found, mesh: DeviceMesh) -> tuple[float, str, float]:
    """Of the output, and of the worst gradient with its name; the same on all ranks."""
    names = list(exact.gradients)
    errors = [_error(found.out, exact.out)]
    errors += [_error(found.gradients[n], exact.gradients[n]) for n in names]
    worst = torch.tensor(errors, dtype=torch.float32, device=mesh.device_type)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    gradient, place = worst[1:].max(0)
    return float(worst[0]), names[int(place)], float(gradient)


def _error(x: Tensor, y: Tensor) -> float:
    error = float((x.double() - y.double()).norm() / y.double().norm())
    return error if error == error else float("inf")
