"""A layer's tokens decoded in place, executed: `python -m triton_support.machine.step --arch sm_80`

Prints the worst relative error of outputs and state against the PyTorch backend in float64, and the
launches. Any fault of theirs is an error.
"""

from __future__ import annotations

import argparse
import json
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from titans_kernels import NeuralMemory, backends
from titans_kernels.kernels.tiles import Tile, using

from .launches import executing
from .sequence import _check_launches

SIZES = {"heads": 2, "dim_head": 16, "expansion": 2, "chunk_size": 4, "per_layer_gates": True}


def run(dtype: torch.dtype, arch: str) -> dict[str, object]:
    """Three tokens of two sequences; the first ends a chunk, which the others open again."""
    torch.manual_seed(0)
    layer = NeuralMemory(32, dtype=dtype, backend="torch", **SIZES)
    judge = NeuralMemory(32, dtype=torch.float64, backend="torch", **SIZES)
    judge.load_state_dict({name: w.double() for name, w in layer.state_dict().items()})
    x = torch.randn(2, 6, 32).to(dtype)
    state, wanted = layer(x[:, :3])[1].clone(), judge(x[:, :3].double())[1].clone()
    layer.backend, errors = "triton", []
    covered = mock.patch.object(backends, "_uncovered", lambda *_: None)
    with covered, using(Tile(16, 16, 16, 16)), executing(arch, poison=True) as found:
        for t in range(3, 6):
            out, _ = layer.step(x[:, t], state, inplace=True)
            exact, _ = judge.step(x[:, t].double(), wanted, inplace=True)
            errors.append(_error(out, exact))
    _check_launches(found)
    pairs = zip(pytree.tree_leaves(state), pytree.tree_leaves(wanted), strict=True)
    errors += [_error(x, y) for x, y in pairs]
    names = [launch.kernel for launch in found]
    return {"dtype": str(dtype), "arch": arch, "error": max(errors), "launches": names}


def _error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.double().norm().clamp_min(1e-30)).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m triton_support.machine.step")
    parser.add_argument("--arch", default="sm_80", choices=("sm_80", "sm_90"))
    arch = parser.parse_args().arch
    for dtype in (torch.float32, torch.bfloat16):
        print(json.dumps(run(dtype, arch)), flush=True)


if __name__ == "__main__":
    main()
