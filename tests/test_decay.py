"""Weight decay leaves alone what it must, whatever happened to the model since it was made."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from titans_kernels import no_weight_decay, parameter_groups, replace
from titans_kernels.models import TitansConfig, TitansForCausalLM

OF_A_MEMORY = {"theta_bias", "alpha_bias", "eta_bias", "norm_weight", "norm_bias", "out_norm"}
OF_A_GATE = {"attention_norm", "memory_norm"}


def _titans():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    return TitansForCausalLM(TitansConfig(**sizes, variant="mag", window=4, chunk_size=4))


def _beside():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    replace(model, "*.self_attn", "lmm", mode="beside")
    return model


def _last(names):
    return {name.rpartition(".")[2] for name in names}


def _sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for module in list(model.modules()):
        if type(module).__name__ in ("NeuralMemory", "Gate", "ClosedGate"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture
def one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("made", [_titans, _beside])
@pytest.mark.parametrize("then", [lambda m: m, copy.deepcopy, _sharded], ids=["", "copy", "fsdp2"])
def test_exempt_by_name(made, then, one_process):
    expected = OF_A_MEMORY | (OF_A_GATE if made is _titans else {"titans_gate"})
    model = then(made())
    names = no_weight_decay(model)
    assert _last(names) == expected
    assert names <= dict(model.named_parameters()).keys()

    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    called = {id(p): name for name, p in model.named_parameters()}
    found = [called[id(p)] for group in (decayed, others) for p in group["params"]]
    assert sorted(found) == sorted(called.values())  # each in one group
    matrices = {name for name, p in model.named_parameters() if p.dim() > 1} - names
    assert {called[id(p)] for p in decayed["params"]} == matrices


def test_flags_survive_copies():
    for made in (_titans, _beside):
        model = copy.deepcopy(made())
        flagged = {n for n, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert flagged == no_weight_decay(model)


def test_under_the_trainer(tmp_path):
    """With weight decay alone, what is exempt stays as it was, and matrices shrink."""
    model = _titans()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    Trainer(model, arguments, train_dataset=[row] * 8, optimizers=(optimizer, None)).train()
    exempt = no_weight_decay(model)
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == (name in exempt or parameter.dim() < 2 or not before[name].any()), name


def test_a_flag_of_somebody_elses_module_counts():
    model = nn.Linear(2, 2)
    model.weight._no_weight_decay = True
    assert no_weight_decay(model) == {"weight"}
