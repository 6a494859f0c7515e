"""A plugin of pytest: every test's outcome is on disk when it is known, and is not run again.

GPU_JOURNAL=gpu.jsonl python -m pytest -p benchmarks.gpu.suite
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ..running.journal import Journal, Row

STAGE = "tests"


def _journal() -> Journal:
    return Journal(Path(os.environ["GPU_JOURNAL"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = _journal().stage(STAGE)
    left = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = left


class Writer:
    """Of one process: the others report to it."""

    def __init__(self) -> None:
        self.journal = _journal()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row: Row = {"outcome": report.outcome, "seconds": report.duration}
            if report.failed:
                crash = getattr(report.longrepr, "reprcrash", None)
                row["problem"] = (crash.message if crash else report.longreprtext)[:300]
            self.journal.add(STAGE, report.nodeid, row)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer())
