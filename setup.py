"""Packaging. Pure Python: nothing is compiled, here or on the user's machine.

The reference lives at the top level, where a reader of the repository looks for it, and travels in
every wheel, sdist and editable install as `titans_kernels.reference`.
"""

import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read(path: str) -> str:
    """The text of a file of this repository."""
    return (HERE / path).read_text(encoding="utf-8")


def repository() -> str | None:
    """Its public address, if this is a clone from GitHub or an sdist that was made in one."""
    if (HERE / "PKG-INFO").exists():
        found = re.search(r"^Project-URL: Repository, (\S+)$", read("PKG-INFO"), re.MULTILINE)
        return found and found[1]
    if not (HERE / ".git").exists():
        return None
    command = ["git", "-C", str(HERE), "remote", "get-url", "origin"]
    try:
        origin = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return None
    found = re.fullmatch(
        r"(?:https://|(?:ssh://)?git@)github\.com[:/]([^/]+/[^/]+?)(\.git)?/?", origin
    )
    return found and f"https://github.com/{found[1]}"


def description() -> str:
    """The README as it stands elsewhere: files of the repository by their public address.

    Without one, pictures and links to files are left out.
    """
    link = r"\[([^\]]*)\]\((?!https:)"
    text, picture = read("README.md"), f"!{link}"
    if REPOSITORY is None:
        text = re.sub(rf"^{picture}.*?\)\n+", "", text, flags=re.MULTILINE)
        return re.sub(rf"{link}[^)]*\)", r"\1", text)
    text = re.sub(picture, rf"![\1]({REPOSITORY}/raw/HEAD/", text)
    return re.sub(rf"{link}(?!#)", rf"[\1]({REPOSITORY}/blob/HEAD/", text)


def addresses() -> dict[str, str]:
    """What the package's page links to, by name."""
    found = {"Paper": "https://arxiv.org/abs/2501.00663"}
    if REPOSITORY is not None:
        found["Repository"] = REPOSITORY
        found["Issues"] = f"{REPOSITORY}/issues"
        found["Documentation"] = f"{REPOSITORY}/blob/HEAD/docs/index.md"
        found["Changelog"] = f"{REPOSITORY}/blob/HEAD/CHANGELOG.md"
    return found


REPOSITORY = repository()

version = re.search(r'^__version__ = "(.+)"$', read("titans_kernels/__init__.py"), re.MULTILINE)
assert version, "titans_kernels/__init__.py has no __version__"

REFERENCE = "titans_kernels.reference"
reference_packages = [REFERENCE, *(f"{REFERENCE}.{name}" for name in find_packages("reference"))]

demo = ["matplotlib", "tqdm"]
bench = ["matplotlib", "tqdm"]
hf = ["transformers>=5.15"]  # older releases of 5 have other caches
train = ["numpy", "omegaconf>=2.3", "tqdm", *hf]
docs = [
    "griffe-inherited-docstrings",
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5",
    "mkdocstrings[python]>=1",
]
dev = [
    "accelerate",  # what transformers' Trainer needs
    "bitsandbytes",  # quantised hosts
    "hypothesis",
    "mypy",
    "parameterized",  # what transformers' own tests are written with
    "peft",
    "pyright[nodejs]",
    "pytest",
    "pytest-xdist",
    "ruff",
    "tensorboard",
    "setuptools>=70.1",  # the tests build a wheel without the network
    "transformers==5.23.0",  # its own tests of models are those of a release
    "titans-pytorch==0.5.5",  # an independent implementation that the tests compare against
]

setup(
    name="titans_kernels",
    version=version[1],
    description="Fused kernels for the Titans neural memory, with PyTorch backend and reference",
    long_description=description(),
    long_description_content_type="text/markdown",
    author="The titans_kernels authors",
    keywords=["titans", "neural memory", "test-time training", "triton", "pytorch", "transformers"],
    project_urls=addresses(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["titans_kernels", "titans_kernels.*"]),
        *reference_packages,
    ],
    package_dir={REFERENCE: "reference"},
    package_data={"titans_kernels": ["py.typed"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "torch>=2.9",  # which comes with Triton 3.5
        # Never pinned: every CUDA build of torch pins the triton that it was made with.
        'triton; platform_system == "Linux"',
    ],
    extras_require={
        "demo": demo,
        "bench": bench,
        "dev": sorted({*dev, *demo, *bench, *docs, *train}),
        "docs": docs,
        "hf": hf,
        "train": train,
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
