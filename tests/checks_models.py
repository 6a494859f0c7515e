"""Checks of the causal language model on meshes of processes, which `test_distributed` runs."""

import process_group
import torch
import torch.distributed as dist
from distributed_cases import close, mesh, whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from titans_kernels.distributed import ReplicateHeads, ShardHeads, ShardLength
from titans_kernels.models import TitansConfig, TitansForCausalLM

MIXERS = "model.layers.*.mixer"
SIZES = {2: [(1, 2, 1), (1, 1, 2)], 4: [(1, 4, 1), (1, 1, 4), (2, 2, 1), (1, 2, 2)]}


def _model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_heads": 4}
    config = TitansConfig(**sizes, variant="mag", window=5, chunk_size=4)
    return TitansForCausalLM(config).to(process_group.DEVICE, torch.float64)


def _sharded(ranks):
    model = _model()
    if ranks["heads"].size() > 1:
        parallelize_module(model, ranks["heads"], {MIXERS: ShardHeads()})
        parallelize_module(model, ranks["heads"], ReplicateHeads())
    if ranks["length"].size() > 1:
        parallelize_module(model, ranks["length"], {MIXERS: ShardLength()})
    shards = ranks["data", "length"]._flatten("shards")
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=shards)
    return model, shards.size()


def _loss(logits, after, count):
    cost = nn.functional.cross_entropy(logits.flatten(0, 1), after.flatten(), reduction="sum")
    return cost / count


def check_language_model(rank, folder):
    ids = torch.randint(11, (2, 18), generator=torch.Generator().manual_seed(2))
    ids = ids.to(process_group.DEVICE)
    one = _model()
    want = one(ids[:, :-1]).logits
    _loss(want, ids[:, 1:], ids[:, 1:].numel()).backward()
    for sizes in SIZES[dist.get_world_size()]:
        ranks = mesh(*sizes, names=("data", "length", "heads"))
        many, shards = _sharded(ranks)
        row, at = (ranks[name].get_local_rank() for name in ("data", "length"))
        now, after, logits = (
            x.chunk(sizes[0], 0)[row].chunk(sizes[1], 1)[at]
            for x in (ids[:, :-1], ids[:, 1:], want)
        )
        got = many(now).logits
        close(got, logits, "out", f"{sizes}")
        _loss(got, after, ids[:, 1:].numel()).backward()
        for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
            close(whole(q.grad) * shards, p.grad, "gradient", f"{sizes} {name}")  # FSDP2: the mean


TWO = [check_language_model]
FOUR = [check_language_model]
