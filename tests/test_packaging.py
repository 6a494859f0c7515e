"""What a user gets: public names, a light import, and packages that carry the reference."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import titans_kernels

ROOT = Path(__file__).parent.parent
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "mkdocs.yml", "LICENSE")
FILES += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff")
FOLDERS = ("titans_kernels", "reference", "tests", "benchmarks", "docs", "examples", ".ci")


def _python(*arguments, cwd, path=ROOT):
    """The output of a fresh interpreter that finds modules in `path` first."""
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(path), "PYTHONWARNINGS": ""}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources alone, so that building leaves nothing behind in the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index")
    _python("-m", "pip", "wheel", *options, "--wheel-dir", out, ".", cwd=checkout)
    [path] = out.glob("*.whl")
    return path


def _modules(folder, name):
    """The paths that the Python files under `folder` have in a package called `name`."""
    return {f"{name}/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}


def _contents():
    """Every file that the installed package must have."""
    modules = _modules(ROOT / "titans_kernels", "titans_kernels")
    return modules | _modules(ROOT / "reference", "titans_kernels/reference")


def test_public_names():
    assert sorted(titans_kernels.__all__) == [
        "MemoryState",
        "NeuralMemory",
        "from_pretrained",
        "load_session",
        "neural_memory",
        "no_weight_decay",
        "parameter_groups",
        "replace",
        "restore",
        "retrieve",
        "save_session",
        "warmup",
    ]
    assert all(hasattr(titans_kernels, name) for name in titans_kernels.__all__)


def test_import_is_light(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import titans_kernels
assert not torch.cuda.is_initialized(), "the import touched a device"
print(*sorted({name for name in sys.modules if name not in before}))
"""
    found = _python("-c", code, cwd=tmp_path).split()
    assert "titans_kernels.layers.mac" in found
    heavy = {"sympy", "transformers", "matplotlib", "omegaconf", "tqdm"}
    heavy |= {"torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    assert not heavy & set(found)


def test_works_without_triton_and_numpy(tmp_path):
    code = """
import sys
sys.modules["triton"] = sys.modules["numpy"] = None  # every import raises ModuleNotFoundError
import torch
from titans_kernels import NeuralMemory, retrieve, verify
assert retrieve(torch.ones(1, 2, 1, 4), (torch.zeros(1, 4, 4),)).sum() == 8
NeuralMemory(8, heads=2)(torch.randn(1, 40, 8))[0].sum().backward()
print(verify.environment("cpu"))
"""
    assert "triton not installed" in _python("-c", code, cwd=tmp_path)


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = (n for n in names if n.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == _contents() | {"titans_kernels/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert wheel.name == f"titans_kernels-{titans_kernels.__version__}-py3-none-any.whl"
    [triton] = (line for line in text.splitlines() if line.startswith("Requires-Dist: triton"))
    assert triton.split(";")[0] == "Requires-Dist: triton", "a pin would fight torch's own"
    description = text.split("\n\n", 1)[1]
    assert (
        description.startswith("# titans_kernels") and "pip install titans_kernels" in description
    )
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets and all(target.startswith("https://") for target in targets)


def test_sdist_contents(checkout, tmp_path):
    """All that a checkout has: tests, reference, benchmarks and documentation too."""
    _python("setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=checkout)
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {file.name.split("/", 1)[-1] for file in archive if file.isfile()}
    found = (path for folder in FOLDERS for path in (checkout / folder).rglob("*"))
    wanted = {path.relative_to(checkout).as_posix() for path in found if path.is_file()}
    made = {name for name in names if name.startswith("titans_kernels.egg-info/")}
    wanted -= {name for name in wanted if name.endswith(".pyc")}
    assert names - made == wanted | set(FILES) | {"PKG-INFO", "setup.cfg"}


@pytest.mark.parametrize(
    "origin, address",
    [
        ("git@github.com:someone/titans_kernels.git", "https://github.com/someone/titans_kernels"),
        ("https://github.com/someone/titans", "https://github.com/someone/titans"),
        ("/somewhere/titans_kernels", None),
    ],
)
def test_a_clone_from_a_public_address_has_pictures_and_links(checkout, tmp_path, origin, address):
    """In an sdist, and in what is built of that elsewhere."""
    clone, built = tmp_path / "clone", tmp_path / "built"
    shutil.copytree(checkout, clone)
    for command in (["init", "--quiet"], ["remote", "add", "origin", origin]):
        subprocess.run(["git", *command], cwd=clone, check=True)
    _python("setup.py", "--quiet", "sdist", "--dist-dir", built, cwd=clone)
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(built, filter="data")
    [sdist] = (path for path in built.iterdir() if path.is_dir())
    first = (sdist / "PKG-INFO").read_text()
    _python("setup.py", "--quiet", "egg_info", "--egg-base", built, cwd=sdist)
    assert (built / "titans_kernels.egg-info" / "PKG-INFO").read_text() == first

    found = dict(
        line.split(": ", 1)[1].split(", ", 1) for line in first.splitlines() if "-URL: " in line
    )
    description = first.split("\n\n", 1)[1]
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", description)
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert all(target.startswith(("https://", "#")) for target in targets)
    if address is None:
        assert set(found) == {"Paper"} and not pictures
        return
    assert found["Repository"] == address and found["Issues"] == f"{address}/issues"
    assert pictures == [f"{address}/raw/HEAD/{path}" for path in _pictures()]
    files = [
        x.split("/HEAD/")[1]
        for x in (*targets, *found.values())
        if x.startswith(f"{address}/") and "/HEAD/" in x
    ]
    assert len(files) > 5 and all((clone / file.split("#")[0]).exists() for file in files)


def _pictures():
    return re.findall(
        r"^!\[[^]]*\]\((?!https:)(.*?)\)", (ROOT / "README.md").read_text(), re.MULTILINE
    )


def test_one_version():
    version = titans_kernels.__version__
    assert re.search(rf"^## \[{version}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_verify_from_a_wheel(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    where = "import titans_kernels.reference as r; print(r.__file__)"
    assert str(installed) in _python("-c", where, cwd=empty, path=installed)
    arguments = ("-m", "titans_kernels.verify", "--quick", "--device", "cpu")
    assert "all ok" in _python(*arguments, cwd=empty, path=installed)


def test_verify_from_a_checkout(checkout):
    code = "from titans_kernels import verify; print(verify._import_reference().__file__)"
    found = Path(_python("-c", code, cwd=checkout, path=checkout).strip())
    # An editable install of the repository, if there is one, may serve as well.
    assert found in {checkout / "reference/__init__.py", ROOT / "reference/__init__.py"}


def test_continuous_integration_installs_exact_versions():
    """Every development dependency but torch, which the Makefile pins, and what builds wheels."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    [extra] = re.findall(r"^dev = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.M | re.S)
    names = {re.match(r"[\w-]+", name)[0] for name in re.findall(r'^    "([^"]+)"', extra, re.M)}
    assert names - {"setuptools"} <= pinned
    assert "CONSTRAINTS=.ci/constraints.txt" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^TORCH +\?= torch==\d", (ROOT / "Makefile").read_text(), re.M)
