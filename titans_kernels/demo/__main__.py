"""The memory at work on real text: `python -m titans_kernels.demo`

Trains a small byte-level language model on the sources of Python's standard library, then reads
files it has never seen as a stream, byte by byte, and measures what the memory's training meanwhile
is worth: the same trained weights read the same text with writing switched off (theta and alpha
exactly 0). Prints the figures, draws them, and ends with the numerics check.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from titans_kernels import verify

from ..train.measures import by_doubling
from ..train.text import Text, excerpts, read_text
from .model import ByteModel, States, is_unwritten, without_writing
from .plot import band, draw
from .reading import read, stream, write_on
from .text import bigram_bits, gzip_bits
from .training import Schedule, train

PLOT = "memory_learns.png"


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    dim: int = 128
    blocks: int = 2
    heads: int = 4
    dim_head: int = 32
    steps: int = 400
    rows: int = 8
    piece: int = 128
    longest: int = 2048
    files: int = 24
    length: int = 2048
    sample: int = 200


QUICK = Size(
    dim=32,
    blocks=1,
    heads=2,
    dim_head=16,
    steps=40,
    piece=64,
    longest=128,
    files=4,
    length=160,
    sample=20,
)
FRESH = 256  # bytes that the reader remembers who starts afresh after every so many
AGREE = 0.01  # bits by which reading byte by byte may differ from reading in pieces, on average


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _options(argv)
    size = QUICK if options.quick else Size()
    # The tensors are small: on a busy machine threads that wait for each other cost far more than
    # a second core gives.
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    print(verify.environment(options.device), flush=True)

    text = read_text()
    model = _trained(text, size, options)
    same = _read(model, text, size, options)
    print("\nDoes this installation agree with the definition?", flush=True)
    verified = verify.main(["--quick", "--device", options.device])
    return 0 if same and verified == 0 else 1


def _trained(text: Text, size: Size, options: argparse.Namespace) -> ByteModel:
    """A model that has read some of the text."""
    model = ByteModel(size.dim, size.blocks, size.heads, size.dim_head).to(options.device)
    million = sum(map(len, text.train)) / 1e6
    print(
        f"Python's standard library: {len(text.train)} files, {million:.1f} MB to train on, "
        f"{len(text.held_out)} files held out\n"
        f"Model: {sum(p.numel() for p in model.parameters()):,} parameters, {size.blocks} blocks "
        f"of {size.heads} memories\n",
        flush=True,
    )
    steps = options.steps or size.steps
    schedule = Schedule(steps, options.seconds, size.rows, size.piece, size.longest)
    start = time.perf_counter()
    losses = train(model, text.train, schedule, options.device, options.seed)
    seconds = time.perf_counter() - start

    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    tokens = len(losses) * size.rows * size.piece
    print(
        f"Training loss {first:.3f} -> {last:.3f} bits per byte, first and last tenth of "
        f"{len(losses)} steps\n"
        f"{tokens:,} bytes in {seconds:.0f} s, {tokens / seconds:,.0f} a second\n",
        flush=True,
    )
    return model.eval()


def _read(model: ByteModel, text: Text, size: Size, options: argparse.Namespace) -> bool:
    """Read held-out files and report; returns whether byte by byte gives the same."""
    excerpt = excerpts(text.held_out, size.length + 1, size.files).to(options.device)
    streamed = stream(model, excerpt)
    in_pieces, _ = read(model, excerpt)
    off, untouched = read(frozen := without_writing(model), excerpt)
    assert is_unwritten(frozen, untouched), "writing is off, and yet a memory changed"
    fresh, _ = read(model, excerpt, piece=FRESH, fresh=True)
    writing = streamed.bits

    difference = float((writing - in_pieces).abs().mean())
    files, length = writing.shape
    rows = {
        "memory writing": writing.mean(),
        f"memory writing, started afresh every {FRESH} bytes": fresh.mean(),
        "writing switched off": off.mean(),
        "for scale: gzip, each excerpt by itself": gzip_bits(excerpt),
        "for scale: byte pairs, counted in all training text": bigram_bits(text.train, excerpt),
    }
    print(f"\nHeld-out text, bits per byte: {length:,} bytes from the middle of {files} files")
    for what, value in rows.items():
        print(f"  {what:<52} {value:6.3f}")

    saved = off - writing
    mean, error = band(saved.mean(1, keepdim=True))
    better = int((saved.mean(1) > 0).sum())
    print(
        f"Writing saves {float(mean):.3f} ± {float(error):.3f} bits per byte "
        f"(standard error over files), in {better} of {files} files"
    )
    ends, parts = by_doubling(saved, 16)
    by_end = zip(ends.tolist(), parts.mean(0).tolist(), strict=True)
    print("  up to byte " + ", ".join(f"{end}: {value:.3f}" for end, value in by_end))

    first, last = streamed.state_bytes[0], streamed.state_bytes[-1]
    print(
        f"\nByte by byte, {files} files at once: {files * length / streamed.seconds:,.0f} bytes a "
        f"second\nState of one file: {first / 1024:.0f} KiB after 1 byte, "
        f"{last / 1024:.0f} KiB after {length:,}\n"
        f"Against reading in pieces: {difference:.1e} bits apart on average"
    )
    _continue(model, excerpt, streamed.states, size, options)

    path = Path(options.out) / PLOT
    title = f"Held-out Python files: the memory saves {float(mean):.2f} bits per byte"
    draw(path, writing, off, title)
    print(f"\nPlot: {path}")
    return difference < AGREE


def _continue(
    model: ByteModel,
    excerpt: Tensor,
    states: States,
    size: Size,
    options: argparse.Namespace,
) -> None:
    """Let the model write on where the first file stopped."""
    one = torch.zeros(1, dtype=torch.int64, device=options.device)
    alone = [state.index_select(one) for state in states]
    written, seconds = write_on(model, excerpt[:1, -1], alone, size.sample, 0.7, options.seed)
    speed = size.sample / seconds
    print(
        f"\nThe first file, then, after |, what the model writes on, {speed:,.0f} bytes a second:"
    )
    shown = bytes(excerpt[0, -size.sample :].tolist()) + b"|" + written
    for line in shown.decode("utf-8", errors="replace").splitlines():
        print(f"  > {line}")


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m titans_kernels.demo",
        description="Train a small byte-level model and watch its memory learn while it reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default_steps = f"training steps (default: {Size().steps})"
    parser.add_argument("--steps", type=int, default=argparse.SUPPRESS, help=default_steps)
    parser.add_argument("--seconds", type=float, default=120, help="train no longer than this")
    parser.add_argument("--out", default="demo-output", help="folder for the plot")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples")
    parser.add_argument("--device", default=verify.default_device(), help="where to run")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny: it runs, and shows little")
    options = parser.parse_args(argv)
    options.steps = getattr(options, "steps", None)
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: pip install 'titans_kernels[demo]'")
    return options


if __name__ == "__main__":
    sys.exit(main())
