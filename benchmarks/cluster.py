"""Titans on many GPUs, on paper: `python -m benchmarks.cluster [--json]`

One sequence, or several, of up to 10 million tokens in training, sharded over its length on up to
1,024 GPUs, for the layers of a model of 1.3 billion parameters: what a rank sends, how much of the
time it waits, what it keeps, and tokens a second. Nothing here was measured on a cluster. The rates
of an H200 and the latency of a chunk are those of `benchmarks` on one GPU, the latter a guess.

    messages  `titans_kernels.distributed.traffic`, which tests compare with what is sent
    memory    of a rank's tokens, chunk after chunk: 16 us of latency for each chunk (4 forward, 4
              again, 8 backward), in as many turns as there are memories for 132 multiprocessors; or
              its 84 D hidden FLOP a token and head, if they take longer
    TNT       local memories begin anew every 2,048 tokens: those of a rank run in parallel.
              The global memory is one chain of chunks of 2,048, each at a multiprocessor's rate
    dense     projections and MLP, 72 dim^2 FLOP a token, at half the GPU's rate
    waiting   ranks are stages and layers are what goes through them: a rank starts on the next
              layer while those behind it are in this one. With R ranks, L layers and P pieces, of
              rows, in each, (R - 1) / (R - 1 + L P) of the time of the chain; the P that is best.
              Of TNT only the global memory is one
    memory    of activations, bfloat16, with checkpointing of every layer: its input; and what one
              layer works on: 12 of x's size, and 128 bytes a token and head of W and S
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch

from titans_kernels import NeuralMemory
from titans_kernels.distributed import traffic

FLOPS, SMS = 790e12, 132  # an H200's, bfloat16, measured on one
CHUNK_LATENCY = 16e-6  # seconds, at D 64 and hidden 256, forward and backward; estimated
LINK, LINK_LATENCY = 50e9, 10e-6  # a GPU's network, 400 Gb/s
LAYERS, DIM, HEADS, D, EXPANSION, CHUNK = 24, 2048, 32, 64, 4, 16
LOCAL, GLOBAL = 2048, 2048  # tokens between resets, and of a chunk of the global memory

PUBLISHED = """\
For comparison, context parallelism of linear attention, whose state is a product and whose ranks
need not wait for each other: LASP-2 (arXiv 2502.07563) trains Linear-Llama3 at 2,048K tokens on 64
GPUs 15.2% faster than LASP, a ring of states as this one, and 36.6% faster than Ring Attention.
flash-linear-attention's gated DeltaNet (its pull request 691; 64 heads of 128, 32,768 tokens, H800)
takes 15.56 ms forward and backward on one GPU and 5.73 ms on 4: 2.7 times as fast."""


class Plan(NamedTuple):
    """Of a rank, in training."""

    model: str
    tokens: int
    rows: int
    ranks: int
    forward_bytes: int  # of a layer and step, to the rank behind; as many tokens as there may be
    backward_bytes: int
    waiting: float  # share of the time
    memory_bytes: float
    seconds: float  # of a step

    @property
    def rate(self) -> float:
        """Tokens a second, of all ranks."""
        return self.rows * self.tokens / self.seconds


def plan(model: str, tokens: int, rows: int, ranks: int) -> Plan:
    """ "titans" or "tnt": rows of so many tokens each, over so many ranks."""
    own = tokens / ranks
    dense = 72 * DIM**2 * own * rows / (0.5 * FLOPS)
    local = _local(own, rows) if model == "tnt" else 0.0

    def chain(pieces: int) -> tuple[float, float]:
        """Seconds of all layers, and of them those that a rank waits."""
        stage = _stage(model, own, rows // pieces, ranks)
        return (ranks - 1 + LAYERS * pieces) * stage, (ranks - 1) * stage

    chained, waited = min(chain(n) for n in range(1, rows + 1) if rows % n == 0)
    seconds = chained + LAYERS * (local + dense)
    sent = _messages(model, rows) if ranks > 1 else (0, 0)
    kept = own * rows * (LAYERS * 2 * DIM + 24 * DIM + 128 * HEADS)
    return Plan(model, tokens, rows, ranks, *sent, waited / seconds, kept, seconds)


def _stage(model: str, own: float, rows: int, ranks: int) -> float:
    """Seconds in which a rank reads its tokens of some rows, in one layer, and sends the state."""
    flop = 84 * D * EXPANSION * D * own * HEADS * rows  # forward and backward
    turns = ceil(HEADS * rows / SMS)
    if model == "titans":
        seconds = max(ceil(own / CHUNK) * CHUNK_LATENCY * turns, flop / FLOPS)
    else:
        seconds = flop / (HEADS * rows) * turns / (FLOPS / SMS)
    if ranks > 1:
        seconds += sum(_messages(model, rows)) / LINK + 2 * LINK_LATENCY
    return seconds


def _local(own: float, rows: int) -> float:
    """Seconds of the local memories of a layer, all that a rank has, in parallel."""
    flop = 84 * D * EXPANSION * D * own * HEADS * rows
    turns = ceil(ceil(own / LOCAL) * HEADS * rows / SMS)
    return max(min(own, LOCAL) / CHUNK * CHUNK_LATENCY * turns, flop / FLOPS)


def _messages(model: str, rows: int) -> traffic.Bytes:
    """Of a layer: Titans' memory, or TNT's global one; its local ones begin at the borders."""
    chunk = CHUNK if model == "titans" else 1  # of TNT, borders are those of chunks: none is open
    layer = NeuralMemory(
        DIM, heads=HEADS, expansion=EXPANSION, chunk_size=chunk, device="meta", dtype=torch.bfloat16
    )
    return traffic.of_length(layer, rows, torch.bfloat16, pieces=rows)


ROW = "{:<7} {:>6} {:>5} {:>6} {:>9} {:>9} {:>8} {:>9} {:>10} {:>9}"
HEADER = ROW.format(
    *("model", "tokens", "rows", "GPUs", "sent, MB", "back, MB", "waiting", "keeps, GB"),
    *("s a step", "tokens/s"),
)


def table(plans: Sequence[Plan]) -> str:
    lines = [HEADER]
    for p in plans:
        lines.append(
            ROW.format(
                *(p.model, f"{p.tokens / 1e6:g}M", p.rows, p.ranks),
                *(f"{p.forward_bytes / 1e6:.1f}", f"{p.backward_bytes / 1e6:.1f}"),
                *(f"{p.waiting:.0%}", f"{p.memory_bytes / 1e9:.2f}"),
                *(f"{p.seconds:.2f}", f"{p.rate:.2e}"),
            )
        )
    return "\n".join(lines)


def plans() -> list[Plan]:
    sizes = [(10**6, 1), (10**6, 8), (10**7, 1), (10**7, 8)]
    return [
        plan(model, tokens, rows, ranks)
        for tokens, rows in sizes
        for model in ("titans", "tnt")
        for ranks in (1, 8, 64, 1024)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="the numbers, for other programs")
    options = parser.parse_args(argv)
    if options.json:
        print(json.dumps([p._asdict() | {"tokens_per_s": p.rate} for p in plans()], indent=2))
        return 0
    print(f"On paper, {LAYERS} layers of {HEADS} heads of {D}, chunks of {CHUNK}:\n")
    print(f"{table(plans())}\n\n{PUBLISHED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
