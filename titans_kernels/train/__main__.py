"""Train a byte-level Titans language model: one process, or several under torchrun.

    python -m titans_kernels.train [config.yaml] [name=value ...]
    torchrun --nproc-per-node 8 -m titans_kernels.train config.json mesh.length=2 mesh.heads=2

Reads every text file of a folder, by default the sources of Python's standard library. Writes into
`out`: config.json, train.csv, evaluation.csv (held-out bits per byte, by how much has been read),
checkpoints/ and, at the end, model/ for `from_pretrained`. The same command resumes a run that
stopped, exactly as if it had not, on any number of processes; with more `steps` also one that has
finished. With start=RUN/model a run begins with the model of another; TNT's second stage is that
with smaller model.local_chunks.

Processes divide the rows of a batch (mesh.data, by default all of them), the tokens of every row
(mesh.length) and the heads (mesh.heads); FSDP2 divides the parameters among all of the first two.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import fields

PACKAGES = ("omegaconf", "tqdm", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m titans_kernels.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="config.yaml, name=value")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"needs {' and '.join(missing)}: pip install 'titans_kernels[train]'")
    from .config import Config, load

    defaults = ", ".join(f"{f.name}={getattr(Config(), f.name)!r}" for f in fields(Config))
    parser.epilog = f"Defaults: {defaults}"
    words = parser.parse_args(argv).words
    path = words.pop(0) if words and "=" not in words[0] else None
    try:
        config = load(path, words)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))

    from .loop import Training
    from .processes import start

    with start(config.device, config.mesh, config.timeout) as processes:
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
