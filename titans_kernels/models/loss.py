"""The loss of a language model without all of its logits at a time.

At a vocabulary of 32,000 the logits of a token are 32 times as many bytes as a hidden state of
1,000, and softmax and its gradient take as much again. In pieces, each computed again for its
gradient, they take the bytes of one piece, and a third of the head's work more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..transforms import transforming

IGNORED = -100


def next_token_loss(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    tokens: int,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of the next token, as `ForCausalLMLoss` of transformers.

    Args:
        head: hidden states [n, dim] to logits [n, vocabulary].
        hidden: [B, T, dim].
        labels: [B, T], the tokens read; -100: no loss.
        tokens: as many at most have their logits at a time.
        num_items_in_batch: what the sum is divided by. Default: the labels other than -100.
        shift_labels: [B, T], the next tokens, instead of labels.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED)
    targets = shift_labels.reshape(-1).to(hidden.device)

    def sum_of(x: Tensor, y: Tensor) -> Tensor:
        logits = head(x)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")

    def kept(x: Tensor, y: Tensor) -> Tensor:
        return checkpoint(sum_of, x, y, use_reentrant=False)

    # The transforms of torch.func take no checkpoints.
    part = kept if torch.is_grad_enabled() and not transforming() else sum_of
    pieces = zip(hidden.flatten(0, -2).split(tokens), targets.split(tokens), strict=True)
    total = torch.stack([part(x, y) for x, y in pieces]).sum()
    if num_items_in_batch is None:
        return total / (targets != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
