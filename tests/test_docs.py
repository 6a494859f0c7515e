"""What the documentation shows runs as it stands."""

import doctest
import functools
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest

from benchmarks.gpu.stages import STAGES
from titans_kernels import NeuralMemory, neural_memory, replace, retrieve, verify, warmup
from titans_kernels.adapt import TitansAttention, TitansPytorchMemory
from titans_kernels.adapt.titans_pytorch import ONLY
from titans_kernels.layers import TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansTNT
from titans_kernels.layers.block import MemoryOptions
from titans_kernels.models import TitansConfig
from titans_kernels.train.config import Config

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
SUPPORT = DOCS / "support.md"
IN_PROCESSES = {"distributed.md"}  # checks_docs.py runs it on four


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@functools.cache
def _run(page):
    """The names that a page's blocks leave behind, run one after another and from nothing."""
    names: dict[str, object] = {}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in _blocks(page):
                exec(compile(block, str(page), "exec"), names)
        finally:
            os.chdir(here)
    return names


PAGES = [page for page in (README, *sorted(DOCS.rglob("*.md"))) if _blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run(page):
    if page.name not in IN_PROCESSES:
        _run(page)


def test_the_readme_is_short_and_runs():
    assert len(README.read_text().splitlines()) <= 150
    names = _run(README)
    assert names["out"].shape == (2, 1000, 384) and names["token"].shape == (2, 384)


def test_the_page_of_the_kernels_has_every_package():
    packages = {path.parent.name for path in (ROOT / "titans_kernels").glob("*/__init__.py")}
    page = (DOCS / "kernels.md").read_text()
    assert not [name for name in packages if f"    titans_kernels/{name}/ " not in page]


def test_as_many_families_are_named_as_were_tried():
    families = set(re.findall(r"^\| (\w+) \| (?:replace|beside)", SUPPORT.read_text(), re.M))
    for page, words in ((README, "decoder families"), (DOCS / "replacing.md", "families")):
        assert f"{len(families)} {words}" in page.read_text()


def test_the_quickstart_returns_what_it_says():
    names = _run(DOCS / "quickstart.md")
    assert names["o"].shape == (1, 1000, 6, 64)
    assert names["token"].shape == names["y_t"].shape == (2, 384)
    assert names["more"].shape == (1, names["text"].shape[1] + 16)


def test_twenty_lines_from_nothing_to_a_model_that_generates():
    """The installation and one block, which needs nothing of those before it."""
    page = DOCS / "replacing.md"
    block = _blocks(page)[0]
    assert 1 + len(block.splitlines()) <= 20
    for part in ("replace(model", "loss.backward()", "optimizer.step()", "model.generate("):
        assert part in block
    assert _run(page)["written"].shape == (1, 80)


MODULES = [
    importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for path in sorted((ROOT / "titans_kernels").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


# ------------------------------------------------------------------------ every option


def _options(owner):
    """The names that one may set."""
    if owner is TitansConfig:
        return list(TitansConfig.__annotations__)
    if owner is Config:
        return [field.name for field in fields(Config)]
    own = inspect.signature(owner).parameters
    names = [name for name in own if name not in ("memory", "options")]  # these are the block's
    return names + (list(MemoryOptions.__annotations__) if "memory" in own else [])


def _in_options(heading):
    """What the tables in a section of the page of options name in their first column."""
    section = re.split(r"^## ", (DOCS / "options.md").read_text(), flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{heading}\n"))
    tables = re.findall(r"^\| option.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


OPERATORS, LAYERS, MODELS, RUNS = "Operators", "Layers", "Models", "Training runs"
TABLES = {
    neural_memory: [OPERATORS],
    retrieve: [OPERATORS],
    NeuralMemory: [LAYERS],
    TitansLMM: [LAYERS],
    TitansMAC: [LAYERS],
    TitansMAG: [LAYERS],
    TitansMAL: [LAYERS],
    TitansTNT: [LAYERS],
    replace: [MODELS],
    TitansAttention: [MODELS],
    TitansConfig: [LAYERS, MODELS],
    Config: [RUNS],
}


@pytest.mark.parametrize("owner", TABLES, ids=lambda owner: owner.__name__)
def test_the_tables_name_every_option(owner):
    named = set().union(*map(_in_options, TABLES[owner]))
    assert not [name for name in _options(owner) if name not in named]


def test_the_tables_name_no_other_options():
    for heading in (OPERATORS, LAYERS, MODELS, RUNS):
        owners = [owner for owner, headings in TABLES.items() if heading in headings]
        assert _in_options(heading) <= {name for owner in owners for name in _options(owner)}


def test_the_options_have_every_variable_of_the_environment():
    sources = "".join(path.read_text() for path in (ROOT / "titans_kernels").rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\[)\s*\"([A-Z_]+)\"", sources))
    of_the_platform = {"LOCALAPPDATA", "XDG_CACHE_HOME"}
    assert {name for name in read if f"`{name}`" not in (DOCS / "options.md").read_text()} == (
        of_the_platform
    )


def test_the_pages_have_every_stage_and_option_of_the_commands(capsys):
    rows = re.findall(r"^\| `([a-z]+)` \|", (DOCS / "benchmarks.md").read_text(), re.M)
    assert rows == list(STAGES)
    with pytest.raises(SystemExit):
        verify.main(["--help"])
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"}
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", (DOCS / "numerics.md").read_text(), re.M)
    assert set(rows) == options


DOCUMENTED = [owner for owner in TABLES if owner is not Config] + [warmup, TitansPytorchMemory]


@pytest.mark.parametrize("owner", DOCUMENTED, ids=lambda owner: owner.__name__)
def test_docstrings_name_every_option(owner):
    text = inspect.getdoc(owner) + (
        inspect.getdoc(owner.__init__) if inspect.isclass(owner) else ""
    )
    known = ONLY if owner is TitansPytorchMemory else ()
    missing = [name for name in _options(owner) if not re.search(rf"\b{name}\b", text)]
    assert not [name for name in missing if name not in known]


# ------------------------------------------------------------------------------- the site

PUBLIC = ["titans_kernels", *(f"titans_kernels.{x}" for x in ("adapt", "distributed", "layers"))]
PUBLIC += ["titans_kernels.models"]


def test_the_reference_has_every_public_name():
    pages = (DOCS / "reference").glob("*.md")
    names = [name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    documented = [pkgutil.resolve_name(":".join(name.rsplit(".", 1))) for name in names]
    for module in map(importlib.import_module, PUBLIC):
        missing = [n for n in module.__all__ if getattr(module, n) not in documented]
        assert not missing, f"{module.__name__}: {missing}"


def test_public_docstrings_have_an_example():
    """All but states, which calls return, and what other docstrings show."""
    shown = {"MemoryState", "ReplicateHeads", "TitansCache", "TitansPreTrainedModel"}
    for module in map(importlib.import_module, PUBLIC):
        names = [n for n in module.__all__ if n not in shown and not n.endswith("State")]
        without = [n for n in names if ">>> " not in inspect.getdoc(getattr(module, n))]
        assert not without, f"{module.__name__}: {without}"


def test_the_site_builds_strictly(tmp_path):
    """No broken link, no page outside the navigation, no name that is not there."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "layers" / "index.html").read_text()
    assert 'id="titans_kernels.layers.TitansMAC"' in page
    assert page.count("Arguments of every block") == 5, "inherited docstrings are shown"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.stem)
def test_links_of_the_repository_lead_somewhere(page):
    """Those of README.md and its neighbours, to files and to sections of pages."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, section = target.partition("#")
        if target.startswith("https://"):
            continue
        path = path or page.name
        assert (ROOT / path).exists(), target
        titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.M) if section else []
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not section or section in slugs, target
