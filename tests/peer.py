"""An independent judge: the memory of titans-pytorch 0.5.5 on given keys, values and gates."""

import pytest
import torch
from torch import nn

titans_pytorch = pytest.importorskip("titans_pytorch")
tensordict = pytest.importorskip("tensordict")


class _Fields(nn.Module):
    """Takes the place of a learned projection: cuts its result out of the packed sequence."""

    def __init__(self, start, stop, function=lambda x: x):
        super().__init__()
        self.start, self.stop, self.function = start, stop, function

    def forward(self, packed):
        return self.function(packed[..., self.start : self.stop])


def titans_pytorch_outputs(q, k, v, theta, alpha, eta, weights, chunk_size):
    """What titans-pytorch makes of the same inputs; differentiable, gates strictly inside (0, 1).

    It equals the op at activation="gelu", residual=False, norm=None, gates [B, T, H]. There:

    * `chunk_size=1` gives every token gates and an update of its own, and `batch_size=C` moves the
      weights at which gradients are taken, once every C tokens; together the paper's chunks of C;
    * retrieval puts an empty query before the sequence and the initial weights before the updates,
      then drops the first result: query t reads the weights after token t, as y_t = f(q_t; W_t);
    * the loss is a mean over d, so its learning rate is d times ours;
    * forgetting is 1 - decay and the surprise is -theta grad: the signs are ours;
    * gates come out of a sigmoid, so it is fed logits (the learning rate's is replaced).

    Heads become batch rows, each with its own weights in the state that the memory starts from.

    Args:
        q, k, v: [B, T, H, D]
        theta, alpha, eta: [B, T, H]
        weights: any number of layers, all hidden ones of the same size.
            tuple of L tensors [H, d_in, d_out]
        chunk_size: int

    Returns:
        (o [B, T, H, D], W_T, S_T), the last two tuples of [B, H, d_in, d_out]
    """
    B, _, H, D = q.shape
    depth, expansion = len(weights), weights[0].shape[-1] / D
    judge = titans_pytorch.NeuralMemory(
        D,
        chunk_size=1,
        batch_size=chunk_size,
        model=titans_pytorch.MemoryMLP(D, depth=depth, expansion_factor=expansion),
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        adaptive_step_transform=lambda step: step,
    )
    judge.to(q)
    judge.to_queries = _Fields(0, D)
    judge.to_keys = _Fields(D, 2 * D)
    judge.to_values = _Fields(2 * D, 3 * D)
    judge.to_adaptive_step = _Fields(3 * D, 3 * D + 1, lambda x: x.squeeze(-1))
    judge.to_decay_factor = _Fields(3 * D + 1, 3 * D + 2)
    judge.to_momentum = _Fields(3 * D + 2, 3 * D + 3, lambda x: x.unsqueeze(0))

    gates = [x.unsqueeze(-1) for x in (theta * D, alpha.logit(), eta.logit())]
    packed = torch.cat([q, k, v, *gates], dim=-1).transpose(1, 2).flatten(0, 1)  # [B H, T, 3D + 3]
    names = judge.memory_model_parameter_names
    start = {name: w.repeat(B, 1, 1) for name, w in zip(names, weights, strict=True)}
    start = tensordict.TensorDict(start, batch_size=[])

    o, state = judge(packed, state=titans_pytorch.NeuralMemState(0, start, None, None, None))
    last_weights, last_momentum = state.states
    return (
        o.unflatten(0, (B, H)).transpose(1, 2),
        tuple(last_weights[name].unflatten(0, (B, H)) for name in names),
        tuple(last_momentum[name][0].unflatten(0, (B, H)) for name in names),
    )
