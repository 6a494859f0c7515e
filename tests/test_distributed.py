"""Layers and models on several processes do what they do on one."""

import doctest

import checks_ddp
import checks_docs
import checks_fsdp
import checks_heads
import checks_length
import checks_models
import checks_traffic
import checks_training
import checks_verify
import process_group
import pytest

from titans_kernels.distributed import heads, length

MODULES = (
    checks_heads,
    checks_length,
    checks_models,
    checks_training,
    checks_traffic,
    checks_verify,
    checks_docs,
    checks_ddp,
    checks_fsdp,
)
TWO = [check for module in MODULES for check in getattr(module, "TWO", [])]
FOUR = [check for module in MODULES for check in getattr(module, "FOUR", [])]
# Those whose tensors are on the device of the process group.
ON_GPU = (checks_heads, checks_length, checks_models, checks_traffic, checks_verify, checks_ddp)
TWO_ON_GPU = [check for module in ON_GPU for check in module.TWO]


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    return process_group.run(
        process_group.selected(request, TWO), 2, tmp_path_factory.mktemp("two")
    )


@pytest.fixture(scope="module")
def two_on_a_gpu(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    checks = process_group.selected(request, TWO_ON_GPU)
    return process_group.run(checks, 2, folder, device="cuda")


@pytest.fixture(scope="module")
def four(request, tmp_path_factory):
    return process_group.run(
        process_group.selected(request, FOUR), 4, tmp_path_factory.mktemp("four")
    )


@pytest.mark.slow
@pytest.mark.parametrize("check", TWO, ids=lambda check: check.__name__)
def test_two_processes(two, check):
    assert two[check.__name__] is None, two[check.__name__]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("check", TWO_ON_GPU, ids=lambda check: check.__name__)
def test_two_processes_on_a_gpu(two_on_a_gpu, check):
    """The same checks over NCCL, or gloo where both have one GPU."""
    assert two_on_a_gpu[check.__name__] is None, two_on_a_gpu[check.__name__]


@pytest.mark.slow
@pytest.mark.parametrize("check", FOUR, ids=lambda check: check.__name__)
def test_four_processes(four, check):
    assert four[check.__name__] is None, four[check.__name__]


@pytest.mark.parametrize("module", [heads, length], ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.wide
def test_all_checks_in_four_processes(tmp_path):
    checks = [*checks_heads.TWO[1:3], *checks_length.TWO[1:]]
    checks += [*checks_traffic.WIDE_FOUR, *checks_training.WIDE_FOUR]
    assert set(process_group.run(checks, 4, tmp_path).values()) == {None}
