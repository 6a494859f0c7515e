"""Layers whose weights are elsewhere: offloaded, quantised, sharded with mixed precision."""

import copy
import os

import accelerate
import pytest
import torch
import torch.distributed as dist
from block_cases import BLOCKS, make_block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree

from titans_kernels import NeuralMemory
from titans_kernels.adapt import TitansPytorchMemory
from titans_kernels.layers.state import State


def _x(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.fixture
def mesh(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/m", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [*BLOCKS, "titans-pytorch"])
@torch.no_grad()
def test_offloaded_weights_are_fetched_by_calls(name):
    if name == "titans-pytorch":
        options = {"heads": 2, "dim_head": 3, "mem_model_norm_add_residual": False}
        layer = TitansPytorchMemory(6, batch_size=4, **options).double()
    else:
        layer = make_block(name)
    x = _x(2, 9, 6, dtype=torch.float64)
    expected = layer(x)[0]
    moved = accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in moved.parameters())
    whole, _ = moved(x)
    assert torch.equal(whole, expected)
    first, state = moved(x[:, :5])
    rest, _ = moved(x[:, 5:], state=state)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected)
    if name == "LMM":
        assert moved.memory.recall(x, state)[0].isfinite().all()


@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_quantised_projections(name):
    block = make_block(name, dim=32, dim_head=16, dtype=torch.float32)
    x = _x(2, 9, 32)
    expected, _ = block(x)
    kinds = {nn.Linear}
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(block), kinds, torch.qint8)
    got, state = quantised(x)
    assert 0 < (got - expected).norm() < 0.1 * expected.norm()
    assert quantised.step(x[:, 0], state)[0].isfinite().all()


@pytest.mark.parametrize("leaves", [False, True], ids=["children", "leaves"])
@pytest.mark.parametrize("name", BLOCKS)
def test_sharded_part_by_part(name, leaves, mesh):
    block, sharded = (make_block(name) for _ in range(2))
    for part in sharded.modules() if leaves else sharded.children():
        if part is not sharded and not (leaves and [*part.children()]):
            fully_shard(part, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = _x(2, 13, 6, dtype=torch.float64)
    for layer in (block, sharded):
        # Gradients of the first piece come through the state alone.
        _, state = layer(x[:, :7])
        layer(x[:, 7:], state)[0].square().sum().backward()
    for (key, p), q in zip(block.named_parameters(), sharded.parameters(), strict=True):
        if p.grad is not None:
            got = q.grad.full_tensor()
            torch.testing.assert_close(got, p.grad, rtol=1e-9, atol=1e-12, msg=key)


def test_fsdp2_does_not_round_a_state(mesh):
    layer = NeuralMemory(32, heads=2)
    half = copy.deepcopy(layer).bfloat16()
    fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x = _x(2, 64, 32)
    with torch.no_grad():
        _, state = layer(x[:, :37])
        got, after = layer(x[:, 37:], state=state)
        assert {w.dtype for w in after.memory.weights} == {torch.float32}
        _, state = half(x[:, :37].bfloat16())
        assert torch.equal(got, half(x[:, 37:].bfloat16(), state)[0])


class _Around(nn.Module):
    """A module of a user's, whose arguments FSDP2 casts before ours is called."""

    def __init__(self):
        super().__init__()
        self.memory = NeuralMemory(32, heads=2)

    def forward(self, x, state=None):
        return self.memory(x, state)


def test_a_rounded_state_is_refused(mesh):
    around, x = _Around(), _x(1, 20, 32)
    fully_shard(around, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    _, state = around(x)
    with pytest.raises(TypeError, match=r"state.memory.weights\[0\]: got dtype torch.bfloat16"):
        around(x, state)


@pytest.mark.parametrize("name", BLOCKS)
def test_states_move_and_copy(name):
    block = make_block(name)
    x = _x(2, 7, 6, dtype=torch.float64).requires_grad_()
    _, state = block(x)
    assert isinstance(state, State)
    for made in (state.clone(), state.to("cpu")):
        assert type(made) is type(state)
        for a, b in zip(pytree.tree_leaves(made), pytree.tree_leaves(state), strict=True):
            assert torch.equal(a, b) and a.requires_grad == b.requires_grad
    copied = pytree.tree_leaves(state.clone())
    kept = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(state)}
    assert not kept & {t.untyped_storage().data_ptr() for t in copied if t.numel()}
    assert not any(t.requires_grad for t in pytree.tree_leaves(state.detach()))
    assert all(t.is_meta for t in pytree.tree_leaves(state.to("meta")))
    with pytest.raises(TypeError, match=r"device: got torch.bfloat16"):
        state.to(torch.bfloat16)
