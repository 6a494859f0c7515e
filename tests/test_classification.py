"""Scores of texts and of tokens: reward models and taggers on a Titans model."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from titans_kernels.models import (
    TitansConfig,
    TitansForCausalLM,
    TitansForSequenceClassification,
    TitansForTokenClassification,
)

SIZE = {
    **{"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2},
    **{"segment": 6, "chunk_size": 4, "expansion": 2, "pad_token_id": 0, "eos_token_id": None},
    **{"bos_token_id": None, "variant": "mac"},
}
AUTO = {
    TitansForSequenceClassification: AutoModelForSequenceClassification,
    TitansForTokenClassification: AutoModelForTokenClassification,
}


def _tokens(*shape, seed=1):
    return torch.randint(1, 37, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", AUTO)
def test_a_language_model_gets_scores_that_are_saved_and_loaded(kind, tmp_path):
    torch.manual_seed(0)
    language = TitansForCausalLM(TitansConfig(**SIZE)).eval()
    language.save_pretrained(tmp_path / "language")
    model = AUTO[kind].from_pretrained(tmp_path / "language", num_labels=3).eval()
    assert type(model) is kind and 0.1 < model.score.weight.std() < 0.4
    tokens = _tokens(2, 9)
    with torch.no_grad():
        hidden = language.model(tokens).last_hidden_state
        expected = model.score(hidden if kind is TitansForTokenClassification else hidden[:, -1])
        torch.testing.assert_close(model(tokens).logits, expected)
        model.save_pretrained(tmp_path / "scores")
        again = AUTO[kind].from_pretrained(tmp_path / "scores").eval()
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rewards_of_padded_texts_are_those_of_the_texts(side):
    torch.manual_seed(0)
    model = TitansForSequenceClassification(TitansConfig(**SIZE, num_labels=1)).double().eval()
    texts = [_tokens(1, 7), _tokens(1, 4, seed=2)]
    pad = torch.zeros(1, 3, dtype=torch.long)
    short = [pad, texts[1]] if side == "left" else [texts[1], pad]
    batch = torch.cat([texts[0], torch.cat(short, 1)])
    with torch.no_grad():
        found = model(batch, attention_mask=batch.ne(0).long()).logits
        expected = torch.cat([model(text).logits for text in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", AUTO)
def test_scores_are_trained_through_the_memories(kind):
    torch.manual_seed(0)
    model, tokens = kind(TitansConfig(**SIZE, num_labels=2)), _tokens(2, 9)
    labels = tokens % 2 if kind is TitansForTokenClassification else tokens[:, 0] % 2
    model(tokens, labels=labels).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not without
