"""Heads of transformers on a Titans model: scores of a text, as rewards, or of its tokens."""

from __future__ import annotations

from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)

from .modeling import TitansPreTrainedModel


class TitansForSequenceClassification(GenericForSequenceClassification, TitansPreTrainedModel):
    """`TitansModel` and `num_labels` scores of a text, at its last token; 1: a reward model.

    Batches of several rows take a `pad_token_id`: the last token is the last other than that.

    Examples:
        >>> import torch
        >>> from titans_kernels.models import TitansConfig, TitansForSequenceClassification
        >>> size = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
        >>> model = TitansForSequenceClassification(
        ...     TitansConfig(**size, variant="lmm", num_labels=1, pad_token_id=0)
        ... )
        >>> model(torch.tensor([[5, 6, 7], [8, 9, 0]])).logits.shape
        torch.Size([2, 1])
    """


class TitansForTokenClassification(GenericForTokenClassification, TitansPreTrainedModel):
    """`TitansModel` and `num_labels` scores of every token, each of what was read up to there.

    Examples:
        >>> import torch
        >>> from titans_kernels.models import TitansConfig, TitansForTokenClassification
        >>> size = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
        >>> model = TitansForTokenClassification(TitansConfig(**size, variant="lmm", num_labels=3))
        >>> model(torch.tensor([[5, 6, 7]])).logits.shape
        torch.Size([1, 3, 3])
    """
