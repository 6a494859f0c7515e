"""Checks of FSDP1, whose parts have their weights only while they are called; FSDP2: test_hosting.

`test_distributed` runs them.
"""

import copy

import torch
from distributed_cases import layer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from titans_kernels.layers.convolution import ShortConvolution
from titans_kernels.layers.learner import MemoryWeights


def check_parts_of_a_layer_in_fsdp1(rank, folder):
    x = torch.randn(2, 13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for kind in (ShortConvolution, MemoryWeights):
        one = layer("lmm")
        many = FullyShardedDataParallel(
            copy.deepcopy(one),
            auto_wrap_policy=ModuleWrapPolicy({kind}),
            device_id=torch.device("cpu"),
            use_orig_params=True,
        )
        for block in (one, many):
            block(x)[0].square().sum().backward()
        torch.testing.assert_close(many(x)[0], one(x)[0], rtol=1e-12, atol=1e-12)
        with FullyShardedDataParallel.summon_full_params(many, with_grads=True):
            pairs = list(zip(one.parameters(), many.parameters(), strict=True))
            for p, q in pairs:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
        assert pairs


TWO = [check_parts_of_a_layer_in_fsdp1]
