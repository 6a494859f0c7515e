"""Train a byte-level Titans language model: one process, or several under torchrun.

    python -m titans_kernels.train [config.json] [name=value ...]
    torchrun --nproc-per-node 8 -m titans_kernels.train config.json

Reads every text file of a folder, by default the sources of Python's standard library. Writes into
`out`: config.json, train.csv, evaluation.csv (held-out bits per byte, by how much has been read),
checkpoints/ and, at the end, model/ for `from_pretrained`. The same command goes on with a run that
stopped, exactly as if it had not.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields

from .config import Config, load


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    defaults = ", ".join(f"{f.name}={getattr(Config(), f.name)!r}" for f in fields(Config))
    parser = argparse.ArgumentParser(
        prog="python -m titans_kernels.train",
        description=__doc__,
        epilog=f"Defaults: {defaults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="config.json, name=value")
    words = parser.parse_args(argv).words
    missing = [name for name in ("tqdm", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: pip install 'titans_kernels[train]'")
    path = words.pop(0) if words and "=" not in words[0] else None
    try:
        config = load(path, words)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))

    from .loop import Training
    from .processes import start

    with start(config.device) as processes:
        training = Training(config, processes)
        if processes.first:
            count = sum(parameter.numel() for parameter in training.model.parameters())
            print(
                f"{count:,} parameters, {processes.count} x {processes.device.type}, "
                f"from step {training.step} to {config.steps}: {config.out}",
                flush=True,
            )
        training.run()
        if processes.first:
            print((training.out / "evaluation.csv").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
