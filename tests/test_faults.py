"""Faults planted in the backward pass: each turns the check of gradients red.

A check that nothing can fail proves nothing. The check is that of
`test_kernels_backward.test_values_and_gradients_equal_the_reference`, on a case of the fault's
kind, and its message names what is wrong.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
import triton
from kernel_cases import Case
from test_kernels_backward import check
from triton.runtime import interpreter as stock

from titans_kernels.kernels import operator
from titans_kernels.kernels.blocks import chunk_at
from titans_kernels.kernels.chunk_backward import output_backward
from titans_kernels.kernels.coefficients_backward import coefficients_backward_kernel
from titans_kernels.kernels.inputs_backward import inputs_backward_kernel
from titans_kernels.kernels.network import error_backward
from titans_kernels.kernels.retrieve_backward import retrieve_backward_kernel
from titans_kernels.kernels.scan_backward import scan_backward_kernel
from titans_kernels.kernels.state_backward import advance_backward, hand_back_tile

if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("faults are planted in the interpreter", allow_module_level=True)


@dataclass(frozen=True)
class Source:
    """A fault in a kernel's text: something else in place of what stands there."""

    function: object
    right: str
    wrong: str

    @contextmanager
    def planted(self):
        prepare, functions = stock.FunctionRewriter._prepare_source, stock.InterpretedFunction

        def changed(rewriter, lines):
            source = prepare(rewriter, lines)
            if rewriter.fn is not self.function.fn:
                return source
            assert source.count(self.right) == 1, f"{self.right!r} is not there, or not once"
            return source.replace(self.right, self.wrong)

        with (
            mock.patch.object(stock.FunctionRewriter, "_prepare_source", changed),
            mock.patch.dict(functions.rewritten_fn),
        ):
            functions.rewritten_fn.pop(self.function.fn, None)
            yield


@dataclass(frozen=True)
class Host:
    """A fault in the operator: a function of its own in place of `backward`."""

    wrong: object

    def planted(self):
        return mock.patch.object(operator, "backward", partial(self.wrong, operator.backward))


def _without_final_state(backward, *args):
    *others, dfinal = args
    return backward(*others, [torch.zeros_like(x) for x in dfinal])


def _without_kept_states(backward, *args):
    *others, kept, do, dfinal = args
    return backward(*others, [torch.zeros_like(x) for x in kept], do, dfinal)


WHOLE = Case("chunks in a block", 16, 4)
PAST = Case("an open chunk", 7, 4, past=(6,))
SPAN = Case("a chunk over blocks", 20, 20)
GROUPS = Case("several groups", 20, 5, group=1)

FAULTS = {
    "dq a little too large": (
        Source(inputs_backward_kernel, "store_t(p_dh, b_dh,", "store_t(p_dh, 1.003 * b_dh,"),
        WHOLE,
        "^dq: ",
    ),
    "dtheta a little too large": (
        Source(coefficients_backward_kernel, "dtheta.to(", "(1.003 * dtheta).to("),
        WHOLE,
        "^dtheta: ",
    ),
    "dv of the wrong sign": (
        Source(output_backward, "store_t(tokens.dv, -b_df,", "store_t(tokens.dv, b_df,"),
        WHOLE,
        "^dv: ",
    ),
    "final state's gradient dropped": (Host(_without_final_state), WHOLE, "^dk: "),
    "states of other groups": (Host(_without_kept_states), GROUPS, "^dq: "),
    "decay off by one": (
        Source(
            coefficients_backward_kernel,
            "tl.load(p_a + t - 1, mask=t > 0, other=1.0)",
            "tl.load(p_a + t)",
        ),
        WHOLE,
        "^dalpha: ",
    ),
    "momentum off by one": (
        Source(coefficients_backward_kernel, "p_P + (t - 1) * BT + o_t", "p_P + t * BT + o_t"),
        WHOLE,
        "^deta: ",
    ),
    "last chunk missed": (
        Source(scan_backward_kernel, "for rear in tl.range(0,", "for rear in tl.range(1,"),
        WHOLE,
        r"\[uninitialised\]|^dk: ",
    ),
    "later chunks begin a token late": (
        Source(chunk_at, "(o_i >= (r + 1) * sizes.CHUNK)", "(o_i > (r + 1) * sizes.CHUNK)"),
        WHOLE,
        "^dk: ",
    ),
    "first query behind a tail missed": (
        Source(retrieve_backward_kernel, "(o_t >= tail)", "(o_t > tail)"),
        PAST,
        "^dq: ",
    ),
    "anchor's gradient dropped": (
        Source(hand_back_tile, "b_dw += b_wk", "b_dw += 0"),
        SPAN,
        "^dweights",
    ),
    "gradient of the norm's scale dropped": (
        Source(error_backward, " - stretch[None, :] * r * n", ""),
        WHOLE,
        "^dk: ",
    ),
    "momentum's share of the block's end dropped": (
        Source(advance_backward, " + b_P[:, None] * b_dside_S", ""),
        WHOLE,
        "^dk: ",
    ),
    "barrier removed": (
        Source(retrieve_backward_kernel, "tl.debug_barrier()", "pass"),
        WHOLE,
        r"\[barrier\].* query_layers\[1\]\.z",
    ),
}


@pytest.mark.parametrize("case", [WHOLE, PAST, SPAN, GROUPS], ids=str)
def test_without_a_fault_the_check_passes(case):
    check(case)


@pytest.mark.parametrize("fault, case, found", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(fault, case, found):
    with fault.planted(), pytest.raises(AssertionError, match=found):
        check(case)
