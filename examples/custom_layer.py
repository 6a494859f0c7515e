"""A layer of your own from the operator: one memory a head, read and trained at every token.

Its gates are parameters, one of each a head; a token's key is the token before it. On sequences of
pairs such as `a 7 b 3 c 1 b` the layer learns to look up what stood behind the first `b`.

    python examples/custom_layer.py --steps 400
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from titans_kernels import neural_memory


class Lookup(nn.Module):
    """[B, T, dim] -> [B, T, dim], with the state of its memories."""

    def __init__(self, dim, heads, chunk_size=8):
        super().__init__()
        self.heads, self.chunk_size, width = heads, chunk_size, dim // heads
        self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.gates = nn.Parameter(torch.tensor([[0.0, -6.0, -2.0]]).repeat(heads, 1))
        self.weight = nn.Parameter(torch.zeros(heads, width, width))  # M_0: a linear memory

    def forward(self, x, state=None):
        def split(y):
            return y.unflatten(-1, (self.heads, -1))  # [B, T, H, D]

        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]  # a token's key is the one before it
        k = F.normalize(split(self.key(previous)), dim=-1)
        q = F.normalize(split(self.key(x)), dim=-1)
        v = split(self.value(x))
        gates = self.gates.sigmoid().expand(*x.shape[:2], -1, -1)  # [B, T, H, 3]
        theta, alpha, eta = gates.unbind(-1)
        o, state = neural_memory(
            *(q, k, v, 0.5 * theta, alpha, eta, (self.weight,)),
            residual=False,
            chunk_size=self.chunk_size,
            initial_state=state,
            output_final_state=True,
        )
        return self.out(o.flatten(-2)), state


def batch(rows, pairs, symbols=16):
    """Pairs of a letter and a digit, then one of the letters again: [rows, 2 pairs + 1], digits."""
    letters = torch.rand(rows, symbols).argsort(1)[:, :pairs]
    digits = torch.randint(symbols, (rows, pairs))
    which = torch.randint(pairs, (rows, 1))
    shown = torch.stack([letters, symbols + digits], 2).flatten(1)
    return torch.cat([shown, letters.gather(1, which)], 1), digits.gather(1, which)[:, 0]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args(argv).steps
    torch.manual_seed(0)
    embed, layer, head = nn.Embedding(32, 32), Lookup(32, heads=2), nn.Linear(32, 16)
    model = nn.ModuleList([embed, layer, head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        tokens, digit = batch(64, pairs=6)
        loss = F.cross_entropy(head(layer(embed(tokens))[0][:, -1]), digit)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, digit = batch(256, pairs=6)
    right = (head(layer(embed(tokens))[0][:, -1]).argmax(1) == digit).float().mean().item()
    print(f"right after {steps} steps: {right:.0%} (chance: 6%)")
    return right


if __name__ == "__main__":
    main()
