"""The recall tasks, the models that are trained on them, and the record of their accuracy."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks.evidence.__main__ import main
from benchmarks.evidence.models import ABLATIONS, KINDS, PARAMETERS, Model
from benchmarks.evidence.report import STYLES, Report, draw, markdown
from benchmarks.evidence.tasks import FILLER, IGNORED, KEYS, TASKS, VALUES, VOCABULARY, texts
from benchmarks.evidence.training import SCHEDULES, Run, Schedule, loss_of, optimizer_of, run
from titans_kernels import NeuralMemory


def _texts(name, n=8, length=64, seed=0, **options):
    return texts(TASKS[name], n, length, torch.Generator().manual_seed(seed), **options)


def is_key(tokens):
    return tokens < KEYS


def is_value(tokens):
    return (tokens >= KEYS) & (tokens < KEYS + VALUES)


@pytest.mark.parametrize("length", [64, 200])
@pytest.mark.parametrize("name", TASKS)
def test_an_answer_is_the_value_behind_its_key(name, length):
    task = TASKS[name]
    for tokens, targets in zip(*_texts(name, length=length), strict=True):
        said = {}
        for i in range(length):
            if targets[i] != IGNORED:
                assert said[int(tokens[i])] == targets[i]
            elif is_key(tokens[i]):
                assert int(tokens[i]) not in said and is_value(tokens[i + 1])
                said[int(tokens[i])] = tokens[i + 1]
        assert len(said) == task.pairs
        # Values stand in pairs only: nothing behind a question gives its target away.
        assert int(is_value(tokens).sum()) == task.pairs
        assert int((targets != IGNORED).sum()) == task.questions
        assert int((tokens >= KEYS + VALUES).sum()) == length - 2 * task.pairs - task.questions
        assert tokens.max() < VOCABULARY == KEYS + VALUES + FILLER


def test_where_pairs_and_questions_stand():
    tokens, targets = _texts("mqar", n=64)
    behind = 2 * TASKS["mqar"].pairs
    assert is_key(tokens[:, 0:behind:2]).all() and is_value(tokens[:, 1:behind:2]).all()
    assert (targets[:, behind:] != IGNORED).any(0).all()  # at every distance

    tokens, targets = _texts("needle", n=64, length=128)
    last = 128 - TASKS["needle"].questions
    assert (targets[:, last:] != IGNORED).all() and (targets[:, :last] == IGNORED).all()
    assert is_value(tokens).nonzero()[:, 1].max() < 128 // 8


def test_keys_say_nothing_of_values():
    """Over texts, a key's values are uniform: nothing but the pair can be learned."""
    tokens, targets = _texts("mqar", n=20_000)
    questions = targets != IGNORED
    index = tokens[questions] * VALUES + targets[questions] - KEYS
    share = torch.bincount(index, minlength=KEYS * VALUES).double() / int(questions.sum())
    assert (share * KEYS * VALUES - 1).abs().max() < 0.3  # 5 sigma


def test_texts_of_a_seed():
    first, again, other = (_texts("mqar", seed=seed)[0] for seed in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)
    with pytest.raises(ValueError, match="length: got 16, takes at least"):
        _texts("mqar", length=16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_learns_a_fixed_batch(kind):
    torch.manual_seed(0)
    model = Model(kind, VOCABULARY)
    assert abs(sum(p.numel() for p in model.parameters()) / PARAMETERS - 1) < 0.01
    optimizer, batch = optimizer_of(model, 3e-3), _texts("mqar", n=2)
    losses = []
    for _ in range(5):
        loss = loss_of(model, *batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)

    if kind.endswith("= 0"):  # the gate is shut still
        for layer in (m for m in model.modules() if isinstance(m, NeuralMemory)):
            assert (getattr(layer, f"{kind.split()[0]}_bias") == -math.inf).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_does_not_look_ahead(kind):
    torch.manual_seed(0)
    model = Model(kind, VOCABULARY)
    tokens, _ = _texts("mqar", n=2)
    changed = tokens.clone()
    changed[:, 40:] = KEYS + VALUES
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :40], model(changed)[:, :40])


def test_the_record_comes_back_and_is_drawn(tmp_path):
    schedule = Schedule(steps=2, tokens=128, evaluation=2)
    short = replace(TASKS["needle"], evaluated=(64,))
    found = run(short, "linear", 3, schedule)
    assert set(found.accuracy) == {64} and len(found.losses) == 2
    machine = dict.fromkeys(
        ("device", "capability", "threads", "python", "torch", "titans_kernels", "commit"), "x"
    )
    report = Report(machine | {"date": "2026-01-01"}, ["a command"])
    shares = dict.fromkeys(TASKS["needle"].evaluated, 0.5)
    for kind, seed in (("memory", 0), ("window", 0), ("window", 1), ("window", 1)):
        report.add(Run("needle", kind, seed, 1000, shares, [2.0, 1.0], 1.0), schedule)
    assert len(report.runs) == 3

    files = report.write(tmp_path / "evidence.json")
    assert all(path.stat().st_size for path in files) and draw(report, files[2]) == files[2]
    again = Report.read(files[0])
    assert again == report and markdown(again) == files[1].read_text()
    assert json.loads(files[0].read_text())["models"].keys() == {"memory", "window"}


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "needle", Schedule(steps=9, tokens=128, evaluation=2))
    command = ["--task", "needle", "--model", "window", "--seed", "5", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert Report.read(path).runs[0].seed == 5 and path.stem.endswith("-1-steps")
    assert "window" in capsys.readouterr().out


def test_models_of_one_picture_look_different():
    assert set(STYLES) == set(KINDS)
    for panel in ([kind for kind in KINDS if kind not in ABLATIONS], ["memory", *ABLATIONS]):
        colours, lines = zip(*(STYLES[kind] for kind in panel), strict=True)
        assert len(set(lines)) == len(set(colours)) == len(panel)
