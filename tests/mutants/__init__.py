"""Faults planted one at a time, each of which must turn a test red.

`faults.txt` has a line for each: a file, the text that stands there once, what is planted in its
place, and the test. A test that no fault can turn red proves nothing, and a fault that no test
notices is a hole: `make mutants` fails on either, and on a line whose text is no longer there.

Nothing is written to the sources. A process is forked for every fault, in which the import of that
file gives the changed text, and pytest runs the one test.
"""

from __future__ import annotations

import importlib.machinery
import linecache
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).parent / "faults.txt"
LIMIT = 60  # seconds of a processor for a test; one that takes longer is not for this table,
HANGS = 300  # nor is one that takes so long by the clock, on a machine that others use too


class Fault(NamedTuple):
    file: str  # from the root
    old: str
    new: str
    test: str  # from tests/, as pytest takes it

    def source(self) -> str:
        """The file with the fault in it."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise LookupError(f"{self.file}: got {self.old!r} {found} times, takes it once")
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return f"{self.file}: {self.old}  ->  {self.new}"


def faults() -> list[Fault]:
    """The table. Empty lines and those that begin with # are not faults."""
    found = []
    for number, line in enumerate(TABLE.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = [part.strip() for part in line.split(" ;; ")]
        if len(parts) != 4:
            raise ValueError(f"{TABLE.name}:{number}: got {len(parts)} parts, takes 4")
        found.append(Fault(*parts))
    return found


planted: Fault | None = None  # in this process, and so in those that its tests start


def plant(fault: Fault) -> None:
    """From here on, importing the file gives the fault. For a process of its own."""
    global planted
    planted = fault
    path, text = str(ROOT / fault.file), fault.source()
    get_code = importlib.machinery.SourceFileLoader.get_code

    def changed(loader: importlib.machinery.SourceFileLoader, name: str) -> object:
        if os.path.realpath(loader.path) != path:
            return get_code(loader, name)
        lines = text.splitlines(keepends=True)  # Triton compiles what `inspect` finds here
        linecache.cache[loader.path] = len(text), None, lines, loader.path
        return compile(text, loader.path, "exec", dont_inherit=True)

    importlib.machinery.SourceFileLoader.get_code = changed  # type: ignore[method-assign,assignment]


def _fork(tests: Sequence[str], fault: Fault | None = None) -> int:
    """The process in which pytest runs these tests, of the sources with the fault."""
    pid = os.fork()
    if pid:
        return pid
    code = pytest.ExitCode.INTERNAL_ERROR
    try:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, LIMIT * len(tests))
        signal.alarm(HANGS * len(tests))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.chdir(ROOT)
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        if fault is not None:
            plant(fault)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    finally:
        os._exit(int(code))


def survivors(chosen: Sequence[Fault], processes: int = 1) -> Iterator[tuple[Fault, str]]:
    """Every fault with what is wrong about it: "" where its test goes red."""
    running: dict[int, Fault] = {}
    for i, fault in enumerate(chosen):
        running[_fork([fault.test], fault)] = fault
        while len(running) == processes or (running and i == len(chosen) - 1):
            pid, status = os.wait()
            code = os.waitstatus_to_exitcode(status)
            yield running.pop(pid), _wrong(code)


def _wrong(code: int) -> str:
    """What a process that ended so says against its test: "" for red, or a crash."""
    if code in (-signal.SIGALRM, -signal.SIGPROF):
        return f"NO VERDICT in {LIMIT} s, {HANGS} s by the clock"
    if code == pytest.ExitCode.OK:
        return "SURVIVED"
    noticed = (pytest.ExitCode.TESTS_FAILED, -signal.SIGSEGV, -signal.SIGABRT)
    return "" if code in noticed else f"pytest ended with {code}"


def green(tests: Sequence[str]) -> bool:
    """Whether these tests pass without a fault."""
    _, status = os.waitpid(_fork(sorted(set(tests))), 0)
    return status == 0
