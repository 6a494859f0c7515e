"""What the checks of sharded layers share: layers, tokens and how close is close."""

import re

import process_group
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from titans_kernels import NeuralMemory
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT

SIZE = {"heads": 4, "dim_head": 3, "chunk_size": 4, "dtype": torch.float64}
TNT = {"heads": 4, "dim_head": 3, "dtype": torch.float64, "n_persistent": 2}
TNT |= {"global_chunk": 5, "local_chunks": (4, 3), "reset_every": 6}
LAYERS = {
    "memory": lambda: NeuralMemory(8, per_layer_gates=True, **SIZE),
    "deep": lambda: NeuralMemory(8, depth=3, norm=False, conv_size=None, **SIZE),
    "lmm": lambda: TitansLMM(8, n_persistent=2, **SIZE),
    "mac": lambda: TitansMAC(8, segment=5, rotary=False, **SIZE),
    "mag": lambda: TitansMAG(8, window=5, rotary=False, **SIZE),
    "tnt": lambda: TitansTNT(8, **TNT),
    "mal": lambda: TitansMAL(8, window=5, rotary=False, **SIZE),
}
SOME = ("memory", "mag", "mac", "tnt")  # each passes states on in another way
RATES = {"out": 1e-11, "gradient": 1e-10}


def layer(name):
    torch.manual_seed(0)
    return LAYERS[name]().to(process_group.DEVICE)


def tokens(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(process_group.DEVICE)


def mesh(*sizes, names=None):
    """Of all processes in a line, without sizes."""
    sizes = sizes or (dist.get_world_size(),)
    return init_device_mesh(process_group.DEVICE.type, sizes, mesh_dim_names=names)


def close(got, want, what, name):
    assert got.shape == want.shape, f"{name}: {what} of shape {list(got.shape)}"
    if want.numel():
        bound = RATES[what] * max(1.0, want.abs().max().item())
        error = (got - want).abs().max().item()
        assert error <= bound, f"{name}: {what} off by {error}"


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def same_gradients(got, want, name):
    for (parameter, p), q in zip(want.named_parameters(), got.parameters(), strict=True):
        close(whole(q.grad), p.grad, "gradient", f"{name}.{parameter}")


def read(layer, pieces, cu_seqlens=None):
    """Pieces one after the other, with the state; and the gradients of the sum of squares."""
    state, outs = None, []
    for x in pieces:
        out, state = layer(x, state, cu_seqlens)
        outs.append(out)
    out = torch.cat(outs, 1)
    out.square().sum().backward()
    return out


def read_by_one(layer, x, pieces, cu_seqlens=None):
    """`read` by the first process for all: the gradients of x and of the parameters, too."""
    found = [None]
    if dist.get_rank() == 0:
        out = read(layer, pieces, cu_seqlens)
        found = [(out.detach(), x.grad, [p.grad for p in layer.parameters()])]
    dist.broadcast_object_list(found)
    found = pytree.tree_map_only(torch.Tensor, lambda t: t.to(process_group.DEVICE), found)
    out, x.grad, grads = found[0]
    for p, grad in zip(layer.parameters(), grads, strict=True):
        p.grad = grad
    return out


def raises(error, words, call):
    with pytest.raises(error, match=re.escape(words)):
        call()
