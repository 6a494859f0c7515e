"""The Triton kernels without gradients: streaming, layouts, limits, reading, forbidden patterns.

In float64 and under the sanitizer. `test_kernels_backward` has the table of cases, outputs, final
states and gradients in one.
"""

import ast
import inspect
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from inputs import make_inputs
from kernel_cases import Case, forced, inputs_of
from triton.runtime import interpreter as stock
from triton_support.interpreter import install
from triton_support.sanitizer import CHECKS, sanitize
from yardstick import assert_values, flat, piece

import reference
from titans_kernels import kernels, neural_memory, retrieve
from titans_kernels.kernels import launch
from titans_kernels.kernels.records import Queries, Tokens
from titans_kernels.kernels.tiles import Blocks, Tile

if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("float64 runs in the interpreter only", allow_module_level=True)
install()

# Scratch of tokens that are not there is never written, and never read.
CHECKED = CHECKS - {"unwritten"}


def _run(case, inputs):
    """o and the final state, by name, of kernels that are watched and run in an order of theirs."""
    with forced(case), sanitize(checks=CHECKED, seed=case.seed) as watch:
        o, state = neural_memory(**inputs, backend="triton", output_final_state=True)
        assert not [name for name in watch.unwritten() if name.startswith("query.o:")]
    return o, state


# ------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("cuts", [(0,), (1,), (5, 15), (16,), (17, 31), (32, 39), (40,)], ids=str)
@pytest.mark.parametrize("chunk", [16, 20])
def test_a_sequence_may_be_cut_anywhere(cuts, chunk):
    _check_pieces(Case("", 40, chunk, H=2, group=1), (0, *cuts, 40))


@pytest.mark.parametrize("depth, chunk", [(1, 5), (2, 5), (2, 1), (2, 40)])
def test_tokens_may_come_one_by_one(depth, chunk):
    _check_pieces(Case("", 12, chunk, depth), range(13))


def _check_pieces(case, edges):
    inputs, state, outputs = inputs_of(case), None, []
    for start, stop in pairwise(edges):
        o, state = _run(case, piece(inputs, start, stop) | {"initial_state": state})
        outputs.append(o)
    want_o, want = reference.neural_memory(**inputs, output_final_state=True)
    got = flat({"o": torch.cat(outputs, 1), "state": state})
    assert_values(got, flat({"o": want_o, "state": want}))
    assert state.length.dtype == torch.int32 and torch.equal(state.length, want.length)


# ---------------------------------------------------------------------------- layouts and limits


@pytest.mark.parametrize("depth", [1, 2])
def test_layout_in_memory_plays_no_part(depth):
    case = Case("", 40, 16, depth, H=2)
    inputs = inputs_of(case)
    o, state = _run(case, inputs)

    def transposed(x):
        if isinstance(x, tuple):
            return tuple(map(transposed, x))
        return x.mT.contiguous().mT if torch.is_tensor(x) and x.dim() > 1 else x

    strided = {name: transposed(x) for name, x in inputs.items()}
    other_o, other = _run(case, strided)
    assert_values(flat({"o": other_o, "state": other}), flat({"o": o, "state": state}), 0.0)
    o, other = (retrieve(x["q"], x["weights"], backend="triton") for x in (inputs, strided))
    assert torch.equal(o, other)


@pytest.mark.parametrize("chunk", [10**9, 10**12])
def test_a_chunk_beyond_any_sequence_is_one_of_its_length(chunk):
    case = Case("", 40, 40)
    inputs = inputs_of(case)
    with forced(case):
        o, _ = neural_memory(**inputs | {"chunk_size": chunk}, backend="triton")
    want, _ = reference.neural_memory(**inputs)
    assert_values({"o": o}, {"o": want})


@pytest.mark.parametrize("goes_on", [False, True])
def test_no_row_and_no_sequence(goes_on):
    for lengths in (None, ()):
        inputs = make_inputs(0 if lengths is None else 1, 0, 2, 16, 32, 2, requires_grad=False)
        if lengths is not None:
            inputs["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
        _, state = neural_memory(**inputs, backend="torch", output_final_state=True)
        past = state if goes_on else None
        o, got = neural_memory(
            **inputs, initial_state=past, backend="triton", output_final_state=True
        )
        assert o.shape == inputs["q"].shape
        assert {n: x.shape for n, x in flat({"": got}).items()} == {
            n: x.shape for n, x in flat({"": state}).items()
        }


def test_offsets_beyond_int32():
    """Tokens at the end of tensors of more than 2^31 elements, of which little is ever touched."""
    case = Case("", 40, 16)
    M, D, dtype = 2**27 + 40, case.D, torch.bfloat16
    tile, norm = Tile(*case.tile), torch.ones(1, 2, D)
    problem = launch.Problem(16, Blocks.of(16, tile), "gelu_tanh", True, "token", norm, tile)

    def far(x):
        """The same tokens, at the end of a tensor that fits no int32."""
        out = torch.empty(M, *x.shape[1:], dtype=x.dtype)
        out[-40:] = x
        return out

    def outputs(q, k, v, gates, start):
        cu = torch.tensor([start, start + 40])
        tokens = Tokens(k, v, *gates, cu[None], torch.zeros(1, dtype=torch.int64), cu[:1])
        W = [torch.ones(1, 1, D, 32) / 8, torch.ones(1, 1, 32, D) / 8]
        S = [torch.zeros_like(w) for w in W]
        o = torch.empty_like(q)
        scratch = launch.allocate(tokens, W, problem, 3).at([*W, *S], [*W, *S])
        launch.coefficients(tokens, scratch, 0, problem)
        launch.scan(tokens, scratch, 0, problem)
        launch.retrieve(Queries(q, o, scratch.parts), tokens, scratch, 0, problem)
        rounded = tuple(w.to(dtype) for w in W)
        read = launch.recall(q, rounded, None, cu, 40, "relu", True, tile)
        return o[-40:], read[-40:], *W, *S

    inputs = make_inputs(1, 40, 1, D, 32, 2, dtype=dtype, requires_grad=False)
    q, k, v = (inputs[name][0] for name in ("q", "k", "v"))
    gates = [inputs[name][0, :, :, None].float() for name in ("theta", "alpha", "eta")]
    want = outputs(q, k, v, gates, 0)
    nothing = mock.patch.object(stock.GridExecutor, "_restore_args_dev", lambda *_: None)
    with nothing, sanitize(checks={"overflow"}):  # nothing to copy back: the tensors are the host's
        got = outputs(far(q), far(k), far(v), [far(x) for x in gates], M - 40)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


# ----------------------------------------------------------------------------------------- reading

READS = [
    Case("one block", 15, 16, H=2),
    Case("blocks and slices", 50, 16, hidden=48, B=2),
    Case("linear", 50, 16, depth=1, D=48, B=2, activation="relu"),
    Case("padded, no norm", 33, 16, D=48, norm=False, activation="silu"),
    Case("tile 64x64, no residual", 70, 16, D=96, hidden=128, residual=False, tile=(64, 64)),
    Case("no token", 0, 16),
    Case("packed", 40, 16, lengths=(0, 17, 1, 22), activation="gelu"),
    Case("state with whole chunks", 20, past=(10, 0), B=2, per_layer=True),
    Case("state with open chunks", 20, past=(13, 3, 5), B=3, per_layer=True),
    Case("state, linear", 20, depth=1, past=(13, 3), B=2),
    Case("state, open chunk over blocks", 20, 40, past=(57, 39), B=2),
    Case("state, packed", 20, past=(13, 0, 5), lengths=(0, 3, 17)),
    Case("state, no token", 0, past=(13,)),
]


@pytest.mark.parametrize("case", READS, ids=str)
def test_retrieve_equals_the_reference(case):
    inputs = inputs_of(case)
    names = ("norm", "activation", "residual", "cu_seqlens")
    options = {name: inputs[name] for name in names if name in inputs}
    memory = inputs.get("initial_state", inputs["weights"])
    checks = CHECKS if case.past is None else CHECKED
    with forced(case), sanitize(checks=checks, seed=1):
        o = retrieve(inputs["q"], memory, **options, backend="triton")
    assert_values({"o": o}, {"o": reference.retrieve(inputs["q"], memory, **options)})


# ------------------------------------------------------------------------------------ what is not

TAKES = {
    "five layers": ({"depth": 5}, "memories of 1 to 4 layers; got 5"),
    "D 20": ({"D": 20}, "a head dimension that is a multiple of 16, at most 256; got 20"),
    "D 272": ({"D": 272}, "a head dimension that is a multiple of 16, at most 256; got 272"),
    "hidden 20": ({"hidden": 20}, "a hidden width that is a multiple of 16, at most 1024; got 20"),
    "hidden 1040": ({"hidden": 1040}, "a hidden width .* at most 1024; got 1040"),
}


@pytest.mark.parametrize("sizes, takes", TAKES.values(), ids=TAKES)
def test_a_case_that_is_not_covered_is_refused(sizes, takes):
    sizes = {"D": 16, "hidden": 32, "depth": 2} | sizes
    inputs = make_inputs(1, 3, 1, **sizes, requires_grad=False)
    refused = pytest.raises(
        NotImplementedError, match=f"^backend: got 'triton', which takes {takes}"
    )
    with refused:
        neural_memory(**inputs, backend="triton")
    with refused:
        retrieve(inputs["q"], inputs["weights"], backend="triton")


def test_a_triton_that_is_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.4.0+git")
    x, w = torch.ones(1, 3, 1, 16), torch.ones(1, 16, 16)
    takes = r"^backend: got 'triton', which takes Triton 3\.5 or newer; found 3\.4\.0\+git$"
    with pytest.raises(NotImplementedError, match=takes):
        retrieve(x, (w,), backend="triton")


def test_a_cpu_is_refused_without_the_interpreter():
    program = """
import torch, titans_kernels
x, w = torch.ones(1, 3, 1, 16), torch.ones(1, 16, 16)
g = x[..., 0]
for call in (
    lambda: titans_kernels.neural_memory(x, x, x, g, g, g, (w,), backend="triton"),
    lambda: titans_kernels.retrieve(x, (w,), backend="triton"),
):
    try:
        call()
    except NotImplementedError as error:
        print(error)
"""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    message = "backend: got 'triton', which takes tensors on a GPU, or TRITON_INTERPRET=1; "
    assert done.stdout == f"{message}got device cpu\n" * 2, done.stderr


# ----------------------------------------------------------------------------- forbidden patterns

MOST_PARAMETERS = 12  # of a kernel: what travels together is a record


def _forbidden(source):
    """What kernels must not do: (line, why) of each.

    Triton before 3.7.1 miscompiles, on Hopper, a product with the transpose of a product: what is
    needed transposed is loaded or computed transposed. A tile that its own transpose is added to
    is no operand: the PTX of 3.6.0 for sm_90 was executed with it (docs/machine.md). A product says
    how it rounds; results do not depend on the order of programs; an offset is as wide as a tensor
    may be long.
    """
    tree, found = ast.parse(source), []
    summed = {
        id(node.value.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.AugAssign)
        and isinstance(node.op, ast.Add)
        and ast.unparse(node.value) == f"tl.trans({ast.unparse(node.target)})"
    }
    widened = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and node.args
        and ast.unparse(node.args[0]) == "tl.int64"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if node.attr in ("trans", "T", "permute", "make_block_ptr") and id(node) not in summed:
                found.append((node.lineno, node.attr))
            if node.attr.startswith("atomic_"):
                found.append((node.lineno, "atomic"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.dot", "tl.dot_scaled"):
            named = {keyword.arg for keyword in node.keywords}
            found += [(node.lineno, x) for x in ("input_precision", "out_dtype") if x not in named]
        is_kernel = isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if is_kernel and len(node.args.args) > MOST_PARAMETERS:
            found.append((node.lineno, "parameters"))
        if isinstance(node, ast.Call) and ast.unparse(node) == "tl.program_id(0)":
            found += [(node.lineno, "int32")] if id(node) not in widened else []
    return found


@pytest.mark.parametrize(
    "path", sorted(Path(kernels.__path__[0]).glob("*.py")), ids=lambda x: x.stem
)
def test_kernels_do_nothing_forbidden(path):
    assert _forbidden(path.read_text()) == []


def test_forbidden_patterns_are_found():
    def kernel():
        tl.dot(tl.trans(x), y, input_precision="ieee", out_dtype=ACC)  # noqa: F821
        tl.dot(x.T, y, input_precision="ieee", out_dtype=ACC)  # noqa: F821
        tl.dot(x, y, out_dtype=ACC)  # noqa: F821
        tl.dot(x, y, input_precision="ieee")  # noqa: F821
        tl.make_block_ptr(p)  # noqa: F821
        tl.atomic_add(p, x)  # noqa: F821
        tl.program_id(0) * tl.program_id(0).to(tl.int64)  # noqa: F821

    source = "\n".join(line[4:] for line in inspect.getsource(kernel).splitlines())
    why = ("trans", "T", "input_precision", "out_dtype", "make_block_ptr", "atomic", "int32")
    assert sorted(_forbidden(source)) == [(2 + i, reason) for i, reason in enumerate(why)]
    assert _forbidden("x += tl.trans(x)") == []
    assert _forbidden("x += tl.trans(y)") == _forbidden("x *= tl.trans(x)") == [(1, "trans")]
    many = f"def a_kernel({', '.join('abcdefghijklm')}): pass"
    assert _forbidden(many) == [(1, "parameters")]
