"""Train a small byte-level Titans language model from nothing, and let it write.

python examples/train_from_scratch.py --text book.txt --out my-model
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch

from titans_kernels import parameter_groups
from titans_kernels.models import TitansConfig, TitansForCausalLM


def read_bytes(path):
    return torch.tensor(list(Path(path).read_bytes()))


def pieces(text, rows, length):
    """Pieces [rows, length] that follow one another; every row has its own part of the text."""
    per_row = len(text) // rows // length * length
    parts = text[: rows * per_row].view(rows, per_row)
    while True:
        yield from parts.split(length, dim=1)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default=pydoc_data.topics.__file__, help="any file")
    parser.add_argument("--out", default="my-model")
    parser.add_argument("--variant", default="mag", choices=("lmm", "mac", "mag", "mal"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    size = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_heads": 4}
    config = TitansConfig(vocab_size=256, variant=args.variant, eos_token_id=None, **size)
    model = TitansForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    cache, losses = None, []
    stream = pieces(read_bytes(args.text), args.rows, args.length)
    for step, tokens in zip(range(args.steps), stream, strict=False):
        tokens = tokens.to(device)
        # The memory is carried from piece to piece; its gradient ends at the border.
        output = model(tokens, labels=tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values.detach()
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(output.loss.item())
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:5d}: {losses[-1] / 0.6931:.3f} bits per byte")

    model.save_pretrained(args.out)
    prompt = torch.tensor([list(b"The ")], device=device)
    written = model.eval().generate(prompt, max_new_tokens=40, do_sample=True)[0]
    print(bytes(written.tolist()).decode(errors="replace"))
    return losses


if __name__ == "__main__":
    main()
