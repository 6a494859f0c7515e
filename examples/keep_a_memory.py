"""Read a book once, keep its memory on disk, and continue from there later.

    python examples/train_from_scratch.py --text book.txt --out my-model
    python examples/keep_a_memory.py my-model --read book.txt --memory book.pt
    python examples/keep_a_memory.py my-model --memory book.pt --prompt "Chapter 2"

The file has the same size however long the book is.
"""

import argparse
import math
from pathlib import Path

import torch

from titans_kernels import load_session, save_session
from titans_kernels.models import TitansForCausalLM


@torch.no_grad()
def read(model, text, length):
    """The cache after all of a text, and its loss in bits per byte."""
    tokens = torch.tensor([list(text)], device=model.device)
    cache, nats, count = None, 0.0, 0
    for piece in tokens.split(length, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits, expected = output.logits[0, :-1], piece[0, 1:]
        nats += torch.nn.functional.cross_entropy(logits, expected, reduction="sum").item()
        count += len(expected)
    return cache, nats / math.log(2) / max(count, 1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder that train_from_scratch.py wrote")
    parser.add_argument("--memory", default="memory.pt", help="the file to keep it in")
    parser.add_argument("--read", help="a text to read first")
    parser.add_argument("--prompt", help="the text after it; the model writes more")
    parser.add_argument("--length", type=int, default=4096, help="bytes read at a time")
    parser.add_argument("--more", type=int, default=40, help="bytes to write")
    args = parser.parse_args(argv)
    model = TitansForCausalLM.from_pretrained(args.model).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    if args.read:
        cache, bits = read(model, Path(args.read).read_bytes(), args.length)
        save_session(cache, args.memory)
        size = Path(args.memory).stat().st_size
        print(f"{cache.get_seq_length():,} bytes read, {bits:.3f} bits each; {size:,} bytes kept")
    if args.prompt:
        cache = load_session(args.memory, device=model.device)
        tokens = torch.tensor([list(args.prompt.encode())], device=model.device)
        written = model.generate(tokens, past_key_values=cache, max_new_tokens=args.more)
        print(bytes(written[0].tolist()).decode(errors="replace"))
        return written
    return cache if args.read else None


if __name__ == "__main__":
    main()
