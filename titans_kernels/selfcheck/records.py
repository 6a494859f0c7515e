"""Checks that passed, one small file each in the user's cache folder.

Nothing depends on a file: one that cannot be read, is of another configuration or cannot be written
means that the next process checks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

from .configuration import Configuration


def folder() -> Path:
    """$TITANS_KERNELS_CACHE, or `titans_kernels` where the platform keeps caches."""
    named = os.environ.get("TITANS_KERNELS_CACHE")
    if named:
        return Path(named)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "titans_kernels"


def path(configuration: Configuration) -> Path:
    text = json.dumps(configuration._asdict(), sort_keys=True)
    return folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(configuration: Configuration) -> bool:
    """Whether a check of this configuration has passed before."""
    try:
        record = json.loads(path(configuration).read_text())
    except (OSError, ValueError):
        return False
    # The file's name is only a hash, and files can be copied: what it says is what counts.
    return record == _record(configuration)


def write(configuration: Configuration) -> None:
    """Whole or not at all, whoever else writes at the same time."""
    target = path(configuration)
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=target.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(_record(configuration), file, indent=1)
            os.replace(part, target)
        except BaseException:
            os.unlink(part)
            raise


def _record(configuration: Configuration) -> dict[str, object]:
    return {"passed": configuration._asdict()}
