"""`TitansPytorchMemory` and the module of titans-pytorch that it replaces."""

import copy
import inspect
import io
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from yardstick import assert_gradients, assert_values

import titans_kernels.adapt.titans_pytorch
from titans_kernels.adapt import TitansPytorchMemory
from titans_kernels.adapt.titans_pytorch import ONLY, NeuralMemState, mem_state_detach

BOUND = 1e-10
PAPER = {"dim": 8, "batch_size": 4, "mem_model_norm_add_residual": False}


def _bounded(steps, top=0.3):
    """A transform that sees the layout of what it is given: [batch * heads, tokens]."""
    return top * steps.sigmoid() * torch.linspace(0.5, 1, len(steps)).to(steps)[:, None]


class MemoryMLP(nn.Module):
    """What `model` is known by: its name and its weights. Without titans-pytorch, too."""

    def __init__(self, *shapes):
        super().__init__()
        weights = (nn.init.xavier_uniform_(torch.empty(shape)) for shape in shapes)
        self.weights = nn.ParameterList(weights)

    def forward(self, x):
        for i, w in enumerate(self.weights):
            x = (nn.functional.gelu(x) if i else x) @ w
        return x


# What is computed exactly. Every argument of theirs is here or in `REFUSED`.
CASES = {
    "one head": {},
    "heads": {"heads": 2, "dim_head": 4},
    "wide heads": {"heads": 3, "dim_head": 8},
    "every norm": {"heads": 2, "dim_head": 6, "post_rmsnorm": True, "qk_rmsnorm": True},
    "no norm": {"pre_rmsnorm": False},
    "a rate for each layer": {
        **{"heads": 2, "dim_head": 4, "per_parameter_lr_modulation": True},
        **{"max_mem_layer_modulation": 3.0, "default_step_transform_max_lr": 0.4},
    },
    "no momentum": {"momentum": False, "per_parameter_lr_modulation": True},
    "heads that start alike": {"heads": 2, "dim_head": 4, "per_head_learned_parameters": False},
    "activation": {"activation": nn.PReLU()},
    "transform": {"heads": 2, "dim_head": 4, "adaptive_step_transform": _bounded},
    "biases": {
        **{"init_adaptive_step_bias": -1.0, "init_momentum_bias": 0.5, "init_decay_bias": -2.0},
    },
    "matrix": {"default_model_kwargs": {"depth": 1}},
    "narrow": {"default_model_kwargs": {"depth": 2, "expansion_factor": 1.4}},
    "three layers": {"model": MemoryMLP((8, 12), (12, 20), (20, 8))},
    "chunks by two names": {"chunk_size": (1, 1), "batch_size": 7, "use_accelerated_scan": False},
}

REFUSED = {
    "chunk_size": [4, (1, 4)],
    "batch_size": [None],
    "store_memory_loss_fn": [lambda pred, target: (pred - target).abs().mean(-1)],
    "model": [nn.Linear(8, 8)],
    "attn_pool_chunks": [True],
    "momentum_order": [2],
    "learned_momentum_combine": [True],
    "learned_combine_include_zeroth": [True],
    "num_kv_per_token": [2],
    "qkv_receives_diff_views": [True],
    "max_grad_norm": [1.0],
    "accept_weight_residual": [True],
    "spectral_norm_surprises": [True],
    "gated_transition": [True],
    "mem_model_norm_add_residual": [True],
    "store_with_lookahead_value": [True],
    "default_step_transform_max_lr": [float("nan"), 0.0],
    "max_mem_layer_modulation": [float("nan"), -1.0],
    "default_model_kwargs": [{}, {"depth": 2, "width": 3}],
    "backend": ["cuda"],
}


def _pair(seed=0, **options):
    """Theirs with every parameter moved from where it starts, and ours from its state_dict."""
    peer = pytest.importorskip("titans_pytorch")
    torch.manual_seed(seed)
    theirs = peer.NeuralMemory(**(PAPER | copy.deepcopy(options))).double()
    for p in theirs.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    ours = TitansPytorchMemory(**(PAPER | copy.deepcopy(options))).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _tokens(*shape, seed=1):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def _gradients(outputs, inputs, module):
    module.zero_grad()
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    parameters = {
        name: p
        for name, p in module.named_parameters(remove_duplicate=False)
        if not name.startswith("memory_model.")  # a template there, not used
    }
    leaves = dict(inputs) | parameters
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _agree(theirs, ours, call, inputs):
    """Outputs and the gradient of every input and parameter; `call` gives a list of outputs."""
    expected, got = call(theirs), call(ours)
    name = "retrieved {}".format
    assert_values(
        {name(i): x for i, x in enumerate(got)}, {name(i): x for i, x in enumerate(expected)}, BOUND
    )
    assert_gradients(_gradients(got, inputs, ours), _gradients(expected, inputs, theirs), BOUND)


# ------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_it_computes_what_theirs_does(options):
    x = _tokens(2, 19, 8)
    _agree(*_pair(**options), lambda memory: [memory(x)[0]], {"seq": x})


def _in_pieces(x, lengths, memory, **options):
    state, outputs = None, []
    for piece in x.split(lengths, dim=1):
        o, state = memory(piece, state=state, **options)
        outputs.append(o)
    return outputs


PIECES = {
    "between batches": [8, 4, 7],
    "inside batches": [5, 6, 8],
    "token by token": [1] * 19,
    "prompt, then tokens": [15, 1, 1, 1, 1],
}


@pytest.mark.parametrize("lengths", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("case", ["one head", "a rate for each layer", "no momentum"])
def test_it_goes_on_as_theirs_does(case, lengths):
    x = _tokens(2, 19, 8)
    _agree(*_pair(**CASES[case]), lambda memory: _in_pieces(x, lengths, memory), {"seq": x})


def test_the_state_is_theirs():
    theirs, ours = _pair(heads=2, dim_head=4)
    state = other = None
    for piece in _tokens(2, 14, 8).detach().split([3, 1, 4, 6], dim=1):
        _, other = theirs(piece, state=other)
        _, state = ours(piece, state=state)
        assert state.seq_index == other.seq_index
        assert_values(state.weights, dict(other.weights.items()), BOUND)


def test_a_state_is_saved_and_cut_off():
    _, memory = _pair()
    x = _tokens(1, 10, 8)
    state = memory(x[:, :6])[1]
    assert state.states.weights[0].requires_grad
    file = io.BytesIO()
    torch.save(state.detach(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, NeuralMemState)
    expected, _ = memory(x[:, 6:], state=state)
    assert torch.equal(memory(x[:, 6:], state=loaded)[0], expected)
    _, cut = memory(x[:, :6], detach_mem_state=True)
    assert not any(w.requires_grad for w in cut.states.weights)
    assert torch.equal(memory(x[:, 6:], state=cut)[0], expected)


def test_what_is_stored_need_not_be_what_is_asked():
    pair, x, other = _pair(heads=2, dim_head=4), _tokens(2, 9, 8), _tokens(2, 9, 8, seed=3)
    inputs = {"seq": x, "store_seq": other}
    _agree(*pair, lambda memory: [memory(x, store_seq=other)[0]], inputs)
    # One query after nine tokens were stored; then the sequence continues.
    one = x[:, :1]

    def retrieve(memory):
        first, state = memory(one, store_seq=other)
        second, _ = memory(one, store_seq=other[:, :3], state=state)
        return [first, second]

    _agree(*pair, retrieve, inputs)
    state = pair[1](one, store_seq=other)[1]
    assert state.seq_index == 9
    assert pair[1](one, store_seq=other[:, :3], state=state)[1].seq_index == 12
    # A token without its dimension.
    _agree(*pair, lambda memory: [memory(x[:, 0])[0]], {"seq": x})


def test_masked_tokens_are_not_learned():
    x, mask = _tokens(2, 9, 8), torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    pair = _pair(heads=2, dim_head=4)
    _agree(*pair, lambda memory: [memory(x, store_mask=mask)[0]], {"seq": x})
    assert not torch.equal(pair[1](x, store_mask=mask)[0], pair[1](x)[0])


def test_what_is_masked_may_have_any_rate():
    """One that is not finite too: it is not multiplied by 0."""
    _, ours = _pair(heads=2, dim_head=4)
    x, mask = _tokens(2, 9, 8).detach(), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 3] = mask[1, 6:] = False
    want, _ = ours(x, store_mask=mask)
    rate = ours.adaptive_step_transform

    def infinite(steps):  # [B heads, T]
        return rate(steps).where(mask.repeat_interleave(2, 0), torch.inf)

    ours.adaptive_step_transform = infinite
    got, _ = ours(x, store_mask=mask)
    assert torch.equal(got, want)


def test_another_batch_size_for_a_call():
    x, lengths = _tokens(2, 19, 8), [5, 14]
    call = partial(_in_pieces, x, lengths, ttt_batch_size=3)
    _agree(*_pair(), call, {"seq": x})


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_parameters_are_theirs(options):
    theirs, ours = _pair(**options)
    names = {name for name in theirs.state_dict() if not name.startswith("memory_model.")}
    assert set(ours.state_dict()) == names
    # Inside of another module, and back.
    theirs, ours = nn.ModuleDict({"memory": theirs}), nn.ModuleDict({"memory": ours})
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    missing, unexpected = theirs.load_state_dict(copy.deepcopy(ours.state_dict()), strict=False)
    assert not unexpected
    assert all(name.startswith("memory.memory_model.") for name in missing)


def test_it_starts_as_theirs_does():
    """Not the same numbers, but their scale; heads start alike."""
    peer = pytest.importorskip("titans_pytorch")
    options = PAPER | {"dim": 64, "heads": 2, "dim_head": 64}
    theirs, ours = (cls(**options) for cls in (peer.NeuralMemory, TitansPytorchMemory))
    expected = theirs.state_dict()
    for name, x in ours.state_dict().items():
        if x.numel() > 100:  # fewer say little of where they came from
            assert 0.8 < (x.std() + 0.01) / (expected[name].std() + 0.01) < 1.25, name
    assert all((w[0] == w[1]).all() for w in ours.memory_model_parameters)
    biased = {f"init_{name}_bias": 0.7 for name in ("adaptive_step", "momentum", "decay")}
    theirs, ours = (cls(**PAPER, **biased) for cls in (peer.NeuralMemory, TitansPytorchMemory))
    for name in ("to_adaptive_step.0", "to_momentum.0", "to_decay_factor.0"):
        for part in ("weight", "bias"):
            want = theirs.state_dict()[f"{name}.{part}"]
            assert torch.equal(ours.state_dict()[f"{name}.{part}"], want)


# ------------------------------------------------------------------------------ arguments


def test_the_arguments_are_theirs():
    peer = pytest.importorskip("titans_pytorch").NeuralMemory
    for mine, its in ((TitansPytorchMemory, peer), (TitansPytorchMemory.forward, peer.forward)):
        mine, its = (dict(inspect.signature(f).parameters) for f in (mine, its))
        mine.pop("backend", None)
        assert list(mine) == list(its), "names, in their order"
        for name, parameter in its.items():
            if name != "store_memory_loss_fn":  # a function of theirs, which ours does not import
                assert mine[name].default == parameter.default, name


def test_every_argument_is_computed_or_refused():
    computed = {"dim"}.union(*CASES.values())
    names = set(inspect.signature(TitansPytorchMemory).parameters)
    assert names == computed | set(REFUSED)
    forward = set(inspect.signature(TitansPytorchMemory.forward).parameters)
    assert set(ONLY) - set(REFUSED) == forward & set(ONLY)


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_what_would_be_another_memory_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got .*, takes "):
        TitansPytorchMemory(**(PAPER | {name: value}))


BAD_SIZES = {
    "dim: got 0": {"dim": 0},
    "heads: got 0": {"heads": 0},
    "dim_head: got 4, takes dim = 8": {"dim_head": 4},
    "batch_size: got 0": {"batch_size": 0},
    "batch_size: got 1000000000": {"batch_size": 10**9},
    "default_model_kwargs depth: got 0": {"default_model_kwargs": {"depth": 0}},
    **{
        f"default_model_kwargs expansion_factor: got {x}": {
            "default_model_kwargs": {"depth": 2, "expansion_factor": x}
        }
        for x in (0, float("nan"), 0.01)
    },
    "model: got weights": {"model": MemoryMLP((4, 8), (8, 4))},
    "init_momentum_bias: got 1.0": {"init_momentum_bias": 1.0, "momentum": False},
}


@pytest.mark.parametrize("message, options", BAD_SIZES.items(), ids=BAD_SIZES)
def test_sizes_that_do_not_fit_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        TitansPytorchMemory(**(PAPER | options))


def _calls():
    x = torch.randn(2, 6, 8)
    return {
        r"seq: got shape \[2, 6, 7\]": (x[..., :7], {}),
        r"store_seq: got shape \[2, 8\]": (x, {"store_seq": x[:, 0]}),
        r"seq: got \[2, 6\] tokens, takes \[2, 4\] or \[2, 1\]": (x, {"store_seq": x[:, :4]}),
        r"seq: got \[2, 6\] tokens, takes \[1, 6\]": (x, {"store_seq": x[:1]}),
        "prev_weights: got": (x, {"prev_weights": {}}),
        "return_surprises: got True, takes False": (x, {"return_surprises": True}),
        "ttt_batch_size: got 0": (x, {"ttt_batch_size": 0}),
        r"store_mask: got torch.bool \[2, 1\]": (x, {"store_mask": x[:, :1, 0] > 0}),
        r"store_mask: got torch.float32 \[2, 6\]": (x, {"store_mask": x[..., 0]}),
        "state: got tuple": (x, {"state": (0, None, None, None, None)}),
        "ttt_batch_size: got 3, takes that of the state, 4": (x, {"ttt_batch_size": 3}),
    }


@pytest.mark.parametrize("message", _calls())
def test_calls_that_do_not_fit_are_refused(message):
    memory = TitansPytorchMemory(**PAPER)
    x, options = _calls()[message]
    if "of the state" in message:
        options["state"] = memory(x)[1]
    with pytest.raises((ValueError, TypeError), match=message):
        memory(x, **options)


def test_titans_pytorch_is_not_needed():
    code = (
        "import sys; sys.modules['titans_pytorch'] = None; import torch;"
        "from titans_kernels.adapt import TitansPytorchMemory as M;"
        "M(8, batch_size=4, mem_model_norm_add_residual=False)(torch.randn(1, 9, 8))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("per_head", [True, False])
def test_the_methods_that_its_users_call(per_head):
    theirs, ours = _pair(heads=2, dim_head=4, per_head_learned_parameters=per_head)
    x = _tokens(2, 9, 8)
    for name in ("init_weights", "init_momentum"):
        expected = getattr(theirs, name)(2)
        got = getattr(ours, name)(2)
        assert got.keys() == dict(expected).keys()
        for key, value in got.items():
            assert torch.equal(value, expected[key])
    _, state = ours(x)
    for weights in (ours.init_weights(2), state.weights):
        one = {name: w[:, None] for name, w in weights.items()}
        expected = [theirs.retrieve_memories(token, one) for token in x.split(1, 1)]
        expected = torch.cat(expected, 1)  # of several tokens it takes weights for each alone
        torch.testing.assert_close(ours.retrieve_memories(x, weights), expected)
    torch.testing.assert_close(ours.retrieve_memories(x, one), expected)
    assert not any(w.requires_grad for w in mem_state_detach(state).weights.values())


def test_names_that_are_refused():
    ours = TitansPytorchMemory(8, batch_size=4, mem_model_norm_add_residual=False)
    with pytest.raises(NotImplementedError, match=r"store_memories: not here.*call the module"):
        ours.store_memories(torch.zeros(1, 3, 8))
    with pytest.raises(AttributeError, match="MemoryAsContextTransformer: not here"):
        _ = titans_kernels.adapt.titans_pytorch.MemoryAsContextTransformer
    with pytest.raises(ImportError):
        from titans_kernels.adapt.titans_pytorch import MemorySwiGluMLP  # noqa: F401
    each = {name: w[:, None].repeat(1, 3, 1, 1) for name, w in ours.init_weights(1).items()}
    with pytest.raises(ValueError, match=r"weights\['weights.0'\]: got shape \[1, 3, 8, 32\]"):
        ours.retrieve_memories(torch.zeros(1, 3, 8), each)
