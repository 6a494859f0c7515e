"""Checks of layers sharded over the length of sequences, which `test_distributed` runs."""

import copy

import process_group
import torch
import torch.distributed as dist
from distributed_cases import (
    LAYERS,
    SOME,
    close,
    layer,
    mesh,
    raises,
    read,
    read_by_one,
    tokens,
    whole,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from titans_kernels import NeuralMemory
from titans_kernels.distributed import ShardHeads, ShardLength

# In chunks of 4 and segments and windows of 5: no border is one of theirs, and a rank may have
# fewer tokens than a filter or a window reaches back, or none.
SIZES = {1: [16], 2: [9, 7], 4: [5, 0, 8, 3]}
PACKED = torch.tensor([0, 2, 2, 10, 16])


def _own(x, rank, count=None):
    return x.split(SIZES[count or dist.get_world_size()], 1)[rank]


def _sharded(one, **options):
    return parallelize_module(copy.deepcopy(one), mesh(), ShardLength(**options))


def _summed_gradients(got, want, name):
    """Each rank has its tokens' share."""
    for (parameter, p), q in zip(want.named_parameters(), got.parameters(), strict=True):
        dist.all_reduce(q.grad)
        close(q.grad, p.grad, "gradient", f"{name}.{parameter}")


def check_outputs_and_gradients_of_tokens(rank, folder):
    """Over two calls, with the state of the first."""
    for name in LAYERS:
        one = layer(name)
        many = _sharded(one, state="all")
        x, y = tokens(2, 16, 8).requires_grad_(), tokens(2, 16, 8)
        y = _own(y, rank).clone().requires_grad_()
        want = read_by_one(one, x, [x, 2 * x])[:, 16:]
        got = read(many, [y, 2 * y])[:, y.shape[1] :]
        close(got, _own(want, rank), "out", name)
        close(y.grad, _own(x.grad, rank), "gradient", name)
        _summed_gradients(many, one, name)


def check_packed_sequences_cut_by_borders(rank, folder):
    for name in ("memory", "mac", "mag", "tnt"):
        one = layer(name)
        many = _sharded(one, state="all", pieces=2)
        x = tokens(1, 16, 8)
        y = _own(x, rank)
        want = read_by_one(one, x, [x, x], PACKED)[:, 16:]
        got = read(many, [y, y], PACKED)[:, y.shape[1] :]
        close(got, _own(want, rank), "out", name)
        _summed_gradients(many, one, name)


def check_sequences_whose_states_stay(rank, folder):
    """With state="none" and borders in a sequence, between two, and between empty ones."""
    at = sum(SIZES[dist.get_world_size()][:1])
    for name in ("memory", "lmm", "mac", "mag", "tnt"):
        one = layer(name)
        many = _sharded(one, state="none", pieces=2)
        x = tokens(1, 16, 8).requires_grad_()
        for packed in (PACKED, torch.tensor([0, 3, at, at, 16]), torch.tensor([0, 16])):
            x.grad, y = None, _own(x, rank).detach().clone().requires_grad_()
            one.zero_grad()
            many.zero_grad()
            want, got = read_by_one(one, x, [x], packed), read(many, [y], packed)
            close(got, _own(want, rank), "out", name)
            close(y.grad, _own(x.grad, rank), "gradient", name)
            _summed_gradients(many, one, name)
        # What they continue from goes to all of them.
        with torch.no_grad():
            _, before = one(x[:, :8], None, PACKED.clamp(max=8))
            want, _ = one(x, before, PACKED)
            got, after = many(y, before if rank == 0 else None, PACKED)
        close(got, _own(want, rank), "out", name)
        assert after is None


def check_resets_at_borders(rank, folder):
    """Local memories begin again there, every 6 tokens, of which two are persistent; a second call
    continues from 2, 3 or 6 since the last reset."""
    one = layer("tnt")
    many = _sharded(one, pieces=2, state="all")
    two, four = ([10, 2], [6, 7], [0, 4]), ([4, 6, 0, 2], [6, 4, 2, 3], [0, 4, 0, 4])
    for sizes in two if dist.get_world_size() == 2 else four:
        one.zero_grad()
        many.zero_grad()
        x = tokens(2, sum(sizes), 8).requires_grad_()
        y = x.detach().split(sizes, 1)[rank].clone().requires_grad_()
        want = read_by_one(one, x, [x, x])[:, x.shape[1] :]
        got = read(many, [y, y])[:, y.shape[1] :]
        close(got, want.split(sizes, 1)[rank], "out", "tnt")
        close(y.grad, x.grad.split(sizes, 1)[rank], "gradient", "tnt")
        _summed_gradients(many, one, "tnt")


def check_pieces(rank, folder):
    """Of any number, the result is the same; so many messages go."""
    one = NeuralMemory(8, heads=3, dim_head=4, conv_size=None, dtype=torch.float64)
    one.to(process_group.DEVICE)
    for p in one.parameters():
        dist.broadcast(p.data, 0)
    x, sent = tokens(2, 16, 8), []
    want, _ = one(x)
    send = dist.isend
    for pieces, messages in ((1, 1), (2, 2), (4, 4), (5, 4), (6, 6), (99, 6)):
        dist.isend = lambda *args, **named: sent.append(args) or send(*args, **named)
        got, _ = _sharded(one, pieces=pieces)(_own(x, rank))
        dist.isend = send
        close(got, _own(want, rank), "out", f"{pieces} pieces")
        last = rank == dist.get_world_size() - 1
        assert len(sent) == (0 if last else messages + 1), (pieces, len(sent))  # and the facts
        sent.clear()


def check_states(rank, folder):
    """In on the first rank, out on the last, or on all."""
    one, last = layer("mag"), dist.get_world_size() - 1
    x = tokens(2, 16, 8)
    _, before = one(x[:, :3])
    want, after = one(x, before)
    for returned in ("last", "all"):
        many = _sharded(one, state=returned)
        got, state = many(_own(x, rank), before if rank == 0 else None)
        close(got, _own(want, rank), "out", returned)
        if returned == "last" and rank != last:
            assert state is None
            continue
        for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(after), strict=True):
            close(a, b, "out", returned)


def check_what_only_a_sequence_starts_with(rank, folder):
    """Has a gradient on all ranks or on none, as on one process: an optimizer passes over none."""
    one = layer("lmm")
    many = _sharded(one)
    x = tokens(2, 16, 8)
    _, before = one(x[:, :3])
    for state, none in ((None, False), (before.detach(), True)):
        for block, y in ((one, x), (many, _own(x, rank))):
            block.zero_grad()
            out, _ = block(y, state if rank == 0 or block is one else None)
            out.sum().backward()
            assert (block.persistent.grad is None) == none
            assert block.memory.weights[0].grad is not None


def check_recall(rank, folder):
    one = layer("memory")
    many = _sharded(one, state="all")
    x = tokens(2, 16, 8)
    _, state = one(x)
    for given in (state, None):
        for cu_seqlens in (None, torch.tensor([0, 7, 16])):
            y = x if cu_seqlens is None else x[:1]
            want, _ = one.recall(y, given, cu_seqlens)
            got, _ = many.recall(_own(y, rank), given, cu_seqlens)
            close(got, _own(want, rank), "out", "recall")


def check_activation_checkpointing(rank, folder):
    for name in ("mag", "mac"):
        one = layer(name)
        many = _sharded(one)
        x = tokens(2, 16, 8).requires_grad_()
        y = _own(x, rank).detach().clone().requires_grad_()
        read_by_one(one, x, [x])
        out, _ = checkpoint(many, y, use_reentrant=False)
        out.square().sum().backward()
        close(y.grad, _own(x.grad, rank), "gradient", name)
        _summed_gradients(many, one, name)


def check_mistakes_of_one_rank(rank, folder):
    """Raised on the next rank; what a rank does alone, all do next."""
    count = dist.get_world_size()
    ranks = mesh()
    raises(TypeError, "got Linear", lambda: ShardLength()._apply(nn.Linear(2, 2), ranks))
    raises(ValueError, "state: got 'first'", lambda: ShardLength(state="first"))
    raises(ValueError, "pieces: got 0", lambda: ShardLength(pieces=0))
    if count != 2:
        return
    many, x, chunks = layer("memory"), tokens(2, 4, 8), copy.deepcopy(layer("memory"))
    pieces, kept = copy.deepcopy(chunks), copy.deepcopy(chunks)
    chunks.chunk_size = 8
    _, state = many(x)
    for part in (many, chunks):
        ShardLength()._apply(part, ranks)
    ShardLength(pieces=3)._apply(pieces, ranks)
    ShardLength(state="none")._apply(kept, ranks)
    faults = [
        ("shape of x", lambda: many(x[:1])),
        ("dtype of x", lambda: many(x.float())),
        ("cu_seqlens", lambda: many(x, None, torch.tensor([0, 8]))),
        ("state: got LayerState", lambda: many(x, state)),
        ("options", lambda: many.recall(x)),
        ("chunk_size: got 8 on rank 1 (2 of 2", lambda: chunks(x)),
        ("pieces: got 3", lambda: pieces(x)),
        ("state of ShardLength: got none", lambda: kept(x)),
    ]
    for words, call in faults:
        dist.barrier()
        if rank == 0:
            # Only as far as the facts: the messages behind them would never be received.
            many._relay.line.put_facts(_facts_of(many, x), 1, x.device)
        else:
            raises(ValueError, words, call)


def _facts_of(many, x):
    from titans_kernels.distributed import agreement

    facts = agreement._facts(many, x, None, None, {"learn": True})
    return facts | {"start": x.shape[1], "read": None}


# ------------------------------------------------------- with heads, FSDP2 and data at once


def check_length_heads_and_fsdp2(rank, folder):
    ranks = mesh(1, 2, 2, names=("data", "length", "heads"))
    at = ranks["length"].get_local_rank()
    for name in LAYERS:
        one, many = layer(name), layer(name)
        parallelize_module(many, ranks["heads"], ShardHeads())
        parallelize_module(many, ranks["length"], ShardLength(state="all"))
        fully_shard(many, mesh=ranks["data", "length"]._flatten("shards"))
        x = tokens(2, 16, 8)
        y = _own(x, at, 2)
        want = read_by_one(one, x, [x, x])[:, 16:]
        got = read(many, [y, y])[:, y.shape[1] :]
        close(got, _own(want, at, 2), "out", name)
        for (parameter, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
            close(whole(q.grad) * 2, p.grad, "gradient", f"{name}.{parameter}")  # FSDP2: the mean


def _apart(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def check_mixed_precision(rank, folder):
    """FSDP2 gives a call bfloat16 parameters: it rounds as one process in bfloat16 does."""
    ranks = mesh(1, 2, 2, names=("data", "length", "heads"))
    at, short = ranks["length"].get_local_rank(), torch.bfloat16
    for name in SOME:
        exact, one, many = layer(name), layer(name).to(short), layer(name).float()
        parallelize_module(many, ranks["heads"], ShardHeads())
        parallelize_module(many, ranks["length"], ShardLength(state="all"))
        policy = MixedPrecisionPolicy(param_dtype=short, reduce_dtype=torch.float32)
        fully_shard(many, mesh=ranks["data", "length"]._flatten("shards"), mp_policy=policy)
        x = tokens(2, 16, 8).to(short)
        y = _own(x, at, 2).clone()
        want = _own(read_by_one(exact, x, [x.double()] * 2)[:, 16:], at, 2)
        rounded = _own(read_by_one(one, x, [x] * 2)[:, 16:], at, 2)
        out, state = many(y)
        memory = getattr(state.memory, "memory", state.memory)  # a block's is its layer's
        assert memory.weights[0].dtype == torch.float32, name
        again, _ = many(y, state)
        torch.cat([out, again], 1).square().sum().backward()
        assert _apart(again, want) <= 3 * _apart(rounded, want), name
        grads = {r.grad.dtype for r in many.parameters()}
        assert grads == {torch.float32}, grads
        want, rounded, got = (
            torch.cat([scale * whole(p.grad).flatten() for p in m.parameters()])
            for m, scale in ((exact, 1), (one, 1), (many, 2))  # FSDP2: the mean
        )
        assert _apart(got, want) <= 3 * _apart(rounded, want), name


TWO = [
    check_outputs_and_gradients_of_tokens,
    check_packed_sequences_cut_by_borders,
    check_sequences_whose_states_stay,
    check_resets_at_borders,
    check_pieces,
    check_states,
    check_what_only_a_sequence_starts_with,
    check_recall,
    check_activation_checkpointing,
    check_mistakes_of_one_rank,
]
FOUR = [
    check_length_heads_and_fsdp2,
    check_mixed_precision,
    check_outputs_and_gradients_of_tokens,
]
