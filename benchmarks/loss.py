"""A language model's loss with all logits at once, and in pieces: `TitansConfig.loss_chunk`.

    python -m benchmarks.loss

Of the head alone, forward and backward, on a CPU: the most bytes of tensors at a time beyond hidden
states and weights, as PyTorch's allocator counts them, and the seconds of one thread's work. The
gradient of the weights is among them, and a sum of it that autograd has not yet added to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from titans_kernels.models.loss import next_token_loss

from .running.machine import describe

VOCABULARY, DIM, TOKENS = 32_000, 768, 2048


def measured(chunk: int | None, tokens: int, dim: int, vocabulary: int) -> tuple[float, int, float]:
    """The loss, bytes and seconds; chunk: None for all logits at once."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, dim, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, dim, generator=generator) / dim**0.5).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens), generator=generator)

    def run(n: int) -> float:
        x, y = hidden[:, :n], labels[:, :n]
        if chunk is None:
            logits = F.linear(x, weight)[0, :-1]
            loss = F.cross_entropy(logits, y[0, 1:])
        else:
            loss = next_token_loss(lambda h: F.linear(h, weight), x, y, chunk)
        loss.backward()
        return float(loss.detach())

    run(8)
    weight.grad = hidden.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(tokens)
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    grown = max(accumulate(x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())))
    weight.grad = hidden.grad = None
    start = time.process_time()
    loss = run(tokens)
    return loss, grown, time.process_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    for name, default in (("tokens", TOKENS), ("dim", DIM), ("vocabulary", VOCABULARY)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    print(f"{describe(1, 512).line()}\n")
    print(f"{options.tokens} tokens, dim {options.dim}, vocabulary {options.vocabulary}, float32\n")
    print("| tokens at a time | loss | MB beyond the inputs | seconds of a core |")
    print("|---|---|---|---|")
    for chunk in (None, 1024, 256, 64):
        loss, grown, seconds = measured(chunk, options.tokens, options.dim, options.vocabulary)
        print(f"| {chunk or 'all'} | {loss:.6f} | {grown / 1e6:,.0f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
