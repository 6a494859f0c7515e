"""The command line: `python -m benchmarks.gpu --help`"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ..running.journal import Journal
from . import __doc__ as about
from .kit import AGAIN, MORE, ROOT, Kit, blame, work
from .stages import STAGES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    out = Path(os.environ.get("OUT", "gpu-results"))
    parser.add_argument("stages", nargs="*", choices=[[], *STAGES], help="default: all")
    parser.add_argument("--out", type=Path, default=out, help="folder ($OUT, else gpu-results)")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="files to resume from")
    parser.add_argument("--retry", action="store_true", help="do again what had a problem")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: 9)")
    parser.add_argument("--wheels", type=Path, help="folder of peers' wheels to install aside")
    parser.add_argument("--commit", default="", help="of the sources, if git is not here")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny and interpreted")
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)  # inside: does the work
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 if all is done, MORE if another call has to continue."""
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    options = parse(arguments)
    if options.deadline is not None:
        return inside(options)

    Journal(options.out / "gpu.jsonl", *options.earlier).keep(not options.retry)
    deadline = time.monotonic() + 60 * options.minutes
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join(_paths(options))
    if options.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", __package__, *arguments, "--deadline", str(deadline)]
    while True:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=max(1.0, deadline - time.monotonic())
            ).returncode
        except subprocess.TimeoutExpired:
            print("out of time in the middle of a step")
            blame(Journal(options.out / "gpu.jsonl"), STAGES)
            return MORE
        if code != AGAIN and 0 <= code < 128:
            return code
        if code != AGAIN:
            blame(Journal(options.out / "gpu.jsonl"), STAGES)
        if deadline - time.monotonic() < 10:
            return MORE
        # A step has taken the process along. Its attempt is on record: it is not tried for ever.
        print(f"exit code {code}: continuing in a new process", flush=True)


def inside(options: argparse.Namespace) -> int:
    journal = Journal(options.out / "gpu.jsonl")
    kit = Kit(journal, options.deadline, options.rehearse, options.commit)
    return work(kit, {name: STAGES[name] for name in options.stages or STAGES})


def _paths(options: argparse.Namespace) -> list[str]:
    """Where modules are found: peers first come from the wheels."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    wheels = sorted(options.wheels.glob("*.whl")) if options.wheels else []
    if wheels:
        site = Path(tempfile.gettempdir()) / "gpu-peers"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", site, *wheels], check=True)
        paths.append(str(site))
    return paths


if __name__ == "__main__":
    sys.exit(main())
