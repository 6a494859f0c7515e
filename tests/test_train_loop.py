"""What the training loop computes, against a plain loop, torch's schedules and whole texts."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from test_train import ALONE, MODEL, TINY
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from titans_kernels import parameter_groups
from titans_kernels.models import TitansConfig, TitansForCausalLM
from titans_kernels.train.config import Config
from titans_kernels.train.loop import Training, rate_of

RUN = TINY | {"steps": 7, "pieces": 3, "warmup": 3, "learning_rate": 0.02, "length": 16}
RUN |= {"clip": 0.5, "weight_decay": 0.5, "evaluate_every": 10, "checkpoint_every": 10, "seed": 3}


def _config(out, **changes):
    return Config(out=str(out), **(RUN | {"model": MODEL} | changes))


# Parameters that are no matrices: biases, scales of norms.
EXEMPT = {
    *("mixer_norm.weight", "mlp_norm.weight", "norm.weight", "attention_norm", "memory_norm"),
    *("norm_weight", "norm_bias", "out_norm", "theta_bias", "alpha_bias", "eta_bias"),
}


def _exempt(name):
    return any(name.endswith(f".{end}") for end in EXEMPT)


def _schedule(optimizer, config):
    """A line up to the peak, then half a cosine down to a tenth, by torch."""
    warmup, peak = config.warmup, config.learning_rate
    line = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    cosine = CosineAnnealingLR(optimizer, config.steps - warmup, eta_min=peak / 10)
    return SequentialLR(optimizer, [line, cosine], [warmup])


def _plain(config, windows):
    """Bits, gradient norm and rate of every step, and the model: written out, with none of ours."""
    torch.manual_seed(config.seed)
    model = TitansForCausalLM(TitansConfig(**config.model_options())).train()
    groups = [
        {"params": [p], "weight_decay": 0.0 if _exempt(name) else config.weight_decay}
        for name, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
    schedule, rows, step = _schedule(optimizer, config), [], 0
    for window in windows:
        cache = None
        pieces = window[:, :-1].split(config.length, 1), window[:, 1:].split(config.length, 1)
        for text, after in zip(*pieces, strict=True):
            if step == config.steps:
                return rows, model
            out = model(text, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            loss = -torch.log_softmax(out.logits, -1).gather(-1, after[..., None]).mean()
            loss = loss / math.log(2)
            gradients = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
            norm = sum(g.square().sum() for g in gradients if g is not None).sqrt()
            assert norm > config.clip, "or clipping is not tried"
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = None if g is None else g * config.clip / (norm + 1e-6)
            rate = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            for layer in cache.layers:
                layer.state = layer.state.detach()
            rows.append({"bits": loss.item(), "gradient": norm.item(), "learning_rate": rate})
            step += 1
    raise AssertionError("too few windows")


@pytest.mark.parametrize("checkpointing, loss_chunk", [(False, None), (True, None), (True, 10)])
def test_a_run_is_a_plain_loop(tmp_path, checkpointing, loss_chunk):
    model = MODEL | {"loss_chunk": loss_chunk}
    config = _config(tmp_path, model=model, gradient_checkpointing=checkpointing)
    training = Training(config, ALONE)
    windows = [training._window(i) for i in range(3)]
    read = []
    mlp = training.model.model.layers[0].mlp
    mlp.register_forward_pre_hook(lambda *_: read.append(1))
    logits = []
    training.model.lm_head.register_forward_hook(
        lambda *args: logits.append(args[-1].shape[:-1].numel())
    )
    training.run(until=1)
    assert max(logits) == (loss_chunk or config.rows * config.length), "tokens with logits at once"
    assert len(read) == 1 + checkpointing, "computed again in the backward pass, or not"
    training.run()
    with (tmp_path / "train.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    want, model = _plain(config, windows)
    for got, expected in zip(found, want, strict=True):
        for name, value in expected.items():
            assert float(got[name]) == pytest.approx(value, rel=2e-4), (got["step"], name)
    for (name, expected), got in zip(
        model.named_parameters(), training.model.parameters(), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("steps, warmup", [(50, 10), (20, 1), (12, 11)])
def test_the_rate_of_every_step(steps, warmup):
    config = Config(steps=steps, warmup=warmup, learning_rate=0.25)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    if warmup == 1:
        schedule = CosineAnnealingLR(optimizer, steps - 1, eta_min=0.025, last_epoch=-1)
        first = 1
    else:
        schedule, first = _schedule(optimizer, config), 0
    for step in range(first, steps):
        assert rate_of(config, step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9), step
        optimizer.step()
        schedule.step()
    assert rate_of(config, 0) == pytest.approx(0.25 / warmup)
    assert rate_of(config, warmup) == pytest.approx(0.25)
    assert rate_of(config, steps) == pytest.approx(0.025)


def test_what_decays():
    model = TitansForCausalLM(TitansConfig(**(MODEL | {"vocab_size": 8})))
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    for name, p in model.named_parameters():
        assert any(p is x for x in (others if _exempt(name) else decayed)["params"]), name


def test_windows_of_text(tmp_path):
    """Each row is a piece of a training file, other ones by seed, window and row alone."""
    training = Training(_config(tmp_path), ALONE)
    texts = [bytes(file.tolist()) for file in training.files]
    rows = [bytes(row.tolist()) for i in range(3) for row in training._window(i)]
    assert len(set(rows)) == len(rows) == 6
    for row in rows:
        assert len(row) == 3 * 16 + 1 and any(row in text for text in texts)
    other = Training(_config(tmp_path / "other", seed=4), ALONE)
    assert not {bytes(row.tolist()) for row in other._window(0)} & set(rows)
    training.rows = range(1, 2)  # as the second of two processes
    assert [bytes(row.tolist()) for row in training._window(2)] == rows[5:]


@torch.no_grad()
@pytest.mark.parametrize("loss_chunk", [None, 14])
def test_evaluation_is_of_whole_texts(tmp_path, loss_chunk):
    """The memory is carried from piece to piece: what reading in one go gives."""
    model = MODEL | {"loss_chunk": loss_chunk}
    training = Training(_config(tmp_path, evaluate_length=40, model=model), ALONE)
    tokens = []
    training.model.lm_head.register_forward_hook(
        lambda head, args, logits: tokens.append(logits[..., 0].numel())
    )
    found = training.evaluate()
    assert max(tokens) == (loss_chunk or 2 * 16) and sum(tokens) == 2 * 40
    assert [(row["from"], row["to"]) for row in found] == [(0, 16), (16, 32), (32, 40)]
    middles = [(len(file) - 41) // 2 for file in training.held_out[:2]]
    pairs = zip(training.held_out, middles, strict=False)
    text = torch.stack([file[at : at + 41] for file, at in pairs]).long()
    logits = training.model.eval()(text[:, :-1]).logits
    bits = F.cross_entropy(logits.mT, text[:, 1:], reduction="none") / math.log(2)
    for row in found:
        want = bits[:, row["from"] : row["to"]].mean().item()
        assert row["bits"] == pytest.approx(want, rel=1e-5)
    assert abs(bits[:, 16:].mean() - bits[:, :16].mean()) > 1e-4
