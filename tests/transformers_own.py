"""The tests that transformers runs on each of its own models, from where they are unpacked.

No wheel holds them. Its source distribution has those of models, which `make test` unpacks; a
checkout has those of generation and export too.

    TRANSFORMERS_TESTS=<checkout of the installed version> python -m pytest -k transformers_own
"""

import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType

FOLDER = os.environ.get("TRANSFORMERS_TESTS")
MIXINS = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
    "test_modeling_common": "ModelTesterMixin",  # takes the two above, so it comes last
}


def _files() -> dict[str, Path]:
    """By module, the file of each mixin, there or not."""
    tests = Path(FOLDER or "", "tests")
    return {module: tests / f"{module.replace('.', '/')}.py" for module in MIXINS}


def absent() -> list[str]:
    """The mixins that are not there."""
    return [MIXINS[module] for module, file in _files().items() if not (FOLDER and file.exists())]


def marks() -> list[str]:
    """The marks on their tests, which pytest would otherwise take for misspelt ones of ours."""
    texts = [file.read_text() for file in _files().values() if FOLDER and file.exists()]
    return sorted(set(re.findall(r"\bmark\.(\w+)", "".join(texts))))


def load() -> ModuleType:
    """transformers' `tests.test_modeling_common`; a mixin that is not there has no tests."""
    assert FOLDER
    package = ModuleType("tests")
    package.__path__ = [str(Path(FOLDER, "tests"))]
    sys.modules["tests"] = package
    for module, mixin in MIXINS.items():
        if mixin in absent():
            empty = ModuleType(f"tests.{module}")
            setattr(empty, mixin, type(mixin, (), {}))
            sys.modules[empty.__name__] = empty
    return importlib.import_module("tests.test_modeling_common")
