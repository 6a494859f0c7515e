"""Packaging. Pure Python: nothing is compiled, here or on the user's machine.

The reference lives at the top level, where a reader of the repository looks for it, and travels in
every wheel, sdist and editable install as `titans_kernels.reference`.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read(path: str) -> str:
    """The text of a file of this repository."""
    return (HERE / path).read_text(encoding="utf-8")


def description() -> str:
    """The README as it stands elsewhere: without pictures and links to files of this repository."""
    text = re.sub(r"^!\[.*?\]\((?!https:).*?\)\n+", "", read("README.md"), flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https:)[^)]*\)", r"\1", text)


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
    project_urls={"Paper": "https://arxiv.org/abs/2501.00663"},
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
