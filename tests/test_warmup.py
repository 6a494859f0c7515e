"""Warming up launches what a real call launches."""

from unittest import mock

import pytest
import torch
import triton
from inputs import make_inputs
from torch.utils import _pytree as pytree

from titans_kernels import neural_memory, retrieve, warmup

launch = pytest.importorskip("titans_kernels.kernels.launch")

NOT_SPECIALISED = ("group", "blocks", "chunks", "final")


def _launched(call):
    """Names and compile-time arguments of the kernels that a call launches."""
    seen = set()
    names = [name for name in vars(launch) if name.endswith("_kernel")]

    def watched(kernel):
        class Watched:
            def __getitem__(self, grid):
                def run(**arguments):
                    kept = {n: x for n, x in arguments.items() if n not in NOT_SPECIALISED}
                    dtypes = pytree.tree_map(lambda x: getattr(x, "dtype", x), kept)
                    seen.add((kernel.__name__, str(dtypes)))
                    return kernel[grid](**arguments)

                return run

        return Watched()

    with mock.patch.multiple(launch, **{name: watched(getattr(launch, name)) for name in names}):
        call()
    return seen


CASES = {
    "as it comes": {},
    "linear": {"depth": 1, "norm": False},
    "gates by layer": {"per_layer_gates": True, "chunk_size": 40, "activation": "silu"},
    "no residual": {"residual": False, "hidden": 48, "dtype": torch.float32},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_launches_what_a_call_does(options, device):
    T, H, D = 33, 1, 16
    options = {"dtype": torch.float32} | options
    warm = _launched(lambda: warmup(H, D, lengths=(T,), device=device, backend="triton", **options))
    depth = options.get("depth", 2)
    inputs = make_inputs(
        1,
        T,
        H,
        D,
        options.get("hidden", 4 * D),
        depth,
        dtype=options["dtype"],
        device=device,
        per_layer_gates=options.get("per_layer_gates", False),
        norm=options.get("norm", True),
        requires_grad=False,
    )
    how = {n: options[n] for n in ("activation", "residual") if n in options}
    how |= {"backend": "triton"}

    def real():
        neural_memory(**inputs, **how, chunk_size=options.get("chunk_size", 16))
        retrieve(inputs["q"], inputs["weights"], norm=inputs["norm"], **how)

    assert warm and _launched(real) == warm


def test_nothing_to_do_on_a_cpu():
    with mock.patch("torch.zeros", side_effect=AssertionError("it did something")):
        warmup(2, 16, device="cpu")


def test_sizes_that_are_not_taken():
    with pytest.raises(NotImplementedError, match="head dimension"):
        warmup(2, 20, device="cpu", backend="triton", lengths=(1,))


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True])
def test_a_call_after_it_compiles_nothing(backward, device):
    H, D = 2, 64
    sizes = {"dtype": torch.bfloat16, "device": device, "requires_grad": backward}
    warmup(H, D, gate_dtype=torch.bfloat16, lengths=(2048,), backward=backward, backend="triton")
    compiled = []

    def hook(*args, **kwargs):
        compiled.append(kwargs)

    with mock.patch.object(triton.knobs.runtime, "jit_post_compile_hook", hook):
        inputs = make_inputs(2, 5000, H, D, 4 * D, 2, **sizes)
        o, _ = neural_memory(**inputs, backend="triton")
        if backward:
            o.sum().backward()
    assert not compiled
