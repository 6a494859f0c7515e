"""Faults planted in PTX text, one place at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator

BARRIER, WAIT, FRAGMENT, ADDRESS = "barrier", "wait group", "fragment", "address"


def faults(ptx: str) -> Iterator[tuple[str, int, str]]:
    """Kind, line and changed text of every fault that the text has a place for.

    A barrier is removed, a wait lets one more group be open, two registers of a product's left
    fragment change places, a load or store of shared memory goes 4 bytes further.
    """
    lines = ptx.split("\n")
    for i, line in enumerate(lines):
        for kind, changed in _changes(line.strip()):
            yield kind, i + 1, "\n".join([*lines[:i], changed, *lines[i + 1 :]])


def everywhere(kind: str, ptx: str) -> str:
    """The text with the first change of a kind at every place that has one."""
    changes = [dict(_changes(line.strip())) for line in ptx.split("\n")]
    lines = zip(ptx.split("\n"), changes, strict=True)
    return "\n".join(change.get(kind, line) for line, change in lines)


def _changes(line: str) -> Iterator[tuple[str, str]]:
    if re.match(r"(bar|barrier)\.sync", line):
        yield BARRIER, ""
    if m := re.match(r"((?:cp\.async|wgmma)\.wait_group\S*\s+)(\d+);", line):
        yield WAIT, f"{m[1]}{int(m[2]) + 1};"
    if line.startswith("mma.sync"):
        left = re.findall(r"\{[^}]*\}", line)[1]
        names = [x.strip() for x in left.strip("{}").split(",")]
        if names[1] != names[2]:
            names[1], names[2] = names[2], names[1]
            yield FRAGMENT, line.replace(left, "{ " + ", ".join(names) + " }", 1)
    if m := re.search(r"(?:ld|st)\.shared.*\[\s*(%\w+)(?:\s*\+\s*(-?\d+))?\s*\]", line):
        yield ADDRESS, re.sub(r"\[[^]]*\]", f"[{m[1]}+{int(m[2] or 0) + 4}]", line, count=1)
