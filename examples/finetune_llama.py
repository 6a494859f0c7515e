"""Give a pretrained Llama a memory next to its attention, and fine-tune it with the Trainer.

The memories' gates are shut at first: before training the model computes what it did, to the bit.

    python examples/finetune_llama.py --model path/or/name --text book.txt --out with-memory
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from titans_kernels import from_pretrained, parameter_groups, replace


def small_llama():
    """A Llama of bytes, in place of one that was pretrained."""
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, eos_token_id=None, **size)
    return AutoModelForCausalLM.from_config(config)


def dataset(path, tokenizer, length):
    """The text in pieces; of bytes where there is no tokenizer."""
    text = Path(path).read_bytes()
    ids = list(text) if tokenizer is None else tokenizer(text.decode(errors="replace")).input_ids
    pieces = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder or a name on the hub; default: a new, small one")
    parser.add_argument("--text", default=pydoc_data.topics.__file__, help="any file")
    parser.add_argument("--out", default="with-memory")
    parser.add_argument("--where", default="model.layers.*.self_attn", help="which attention")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model) if args.model else None
    model = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small_llama()
    names = replace(model, args.where, "lmm", mode="beside")
    print(f"{len(names)} memories")
    if args.model:  # what was pretrained stays; the memories learn
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".titans." in name

    often = {"logging_steps": max(1, args.steps // 20), "save_strategy": "no", "report_to": []}
    options = TrainingArguments(
        f"{args.out}/trainer", max_steps=args.steps, per_device_train_batch_size=4, **often
    )
    # The Trainer would let weight decay shrink the gates' biases: it gets the optimizer.
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-3)
    pieces = dataset(args.text, tokenizer, args.length)
    trainer = Trainer(model, options, train_dataset=pieces, optimizers=(optimizer, None))
    trainer.train()

    model.save_pretrained(args.out)  # the recipe of replace is in its config.json
    loaded = from_pretrained(args.out).to(model.device)
    with torch.no_grad():
        tokens = pieces[0]["input_ids"][None].to(model.device)
        same = torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    print(f"loaded again: {'the same' if same else 'other'} logits")
    return names, trainer.state.log_history, same


if __name__ == "__main__":
    main()
