"""The device that tests run on, and what is skipped where there is no GPU."""

import os

import pytest
import torch
import transformers_own
import triton_support

if not torch.cuda.is_available():
    triton_support.use_interpreter()  # before anything imports triton
    # Else "auto" would take the interpreter, which is slow. Tests of "auto" set it themselves.
    os.environ["TITANS_KERNELS_AUTO"] = "torch"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Every worker has a core: more threads would only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """A GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_configure(config: pytest.Config) -> None:
    for mark in transformers_own.marks():
        config.addinivalue_line("markers", f"{mark}: on transformers' own tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
