"""Triton's CPU interpreter, made to compute what a GPU computes. For Triton 3.6 to 3.9.

Left alone it does arithmetic on the bits of a bfloat16 as if they were an integer, gives kernels
Python's integers as loop variables, skips `tl.device_assert`, multiplies float32 exactly where a
tensor core would see tf32, and accepts products too small for one. `install()` mends that once for
the process; float64 goes through untouched. It also patches the language once a launch, not once a
device function, and makes a shape once: kernels of small functions are several times as fast.

An error in a kernel is raised as itself, not wrapped.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.interpreter import TensorHandle

Array = np.ndarray[Any, Any]
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
TF32_BITS = np.uint32(0xFFFFE000)  # a tensor core reads a float32's upper 19 bits, no rounding
QUIET_NAN = np.uint16(0x7FC0)


# ------------------------------------------------------------------------------------- number types


def bfloat16_to_float32(bits: Array) -> Array:
    """The values of bfloat16s that are given, as everywhere in the interpreter, as uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """To the nearest, ties to even; every NaN becomes the quiet one."""
    bits = values.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), QUIET_NAN, nearest.astype(np.uint16))


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _wide(handle: TensorHandle) -> TensorHandle:
    """The same values as float32, where they are bfloat16."""
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle(bfloat16_to_float32(handle.data), tl.float32)


def _narrow(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(float32_to_bfloat16(handle.data), tl.bfloat16)


# --------------------------------------------------------------------------------------- operations


class DeviceBuilder(stock.InterpreterBuilder):
    """Operations on bfloat16 happen in float32 and are rounded back, as GPUs do them."""

    def cast_impl(self, src, dst_type):
        src = _wide(src)
        if dst_type.scalar == tl.bfloat16:
            return _narrow(super().cast_impl(src, tl.float32))
        return super().cast_impl(src, dst_type)

    def get_bf16(self, value):
        return _narrow(self.get_fp32(value))

    def unary_op(self, arg, op):
        out = super().unary_op(_wide(arg), op)
        return _narrow(out) if _is_bfloat16(arg) else out

    def binary_op(self, lhs, rhs, op):
        bfloat16 = op not in BITWISE and (_is_bfloat16(lhs) or _is_bfloat16(rhs))
        out = super().binary_op(*(_wide(x) if bfloat16 else x for x in (lhs, rhs)), op)
        if out.data.dtype == np.bool_:  # a comparison, which has its operands' type until here
            return TensorHandle(out.data, tl.int1)
        return _narrow(out) if bfloat16 else out

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bfloat16(other):  # a choice moves bits, whatever they mean
            return super().ternary_op(lhs, rhs, other, op)
        return _narrow(super().ternary_op(_wide(lhs), _wide(rhs), _wide(other), op))

    def create_fma(self, x, y, z):
        if not _is_bfloat16(z):
            return super().create_fma(x, y, z)
        x, y, z = (_wide(h).data.astype(np.float64) for h in (x, y, z))
        return TensorHandle(float32_to_bfloat16(x * y + z), tl.bfloat16)

    # Until Triton 3.7 these let a NaN through, as a GPU does only when asked to.
    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_erf(self, arg):
        out = torch.erf(torch.from_numpy(np.ascontiguousarray(arg.data)))  # NumPy has none
        return TensorHandle(out.numpy(), arg.dtype.scalar)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (_tensor_core_operand(x, input_precision.name) for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


def _tensor_core_operand(handle: TensorHandle, precision: str) -> TensorHandle:
    handle = _wide(handle)
    if handle.dtype.scalar == tl.float16:  # products of halves are exact in float32
        return TensorHandle(handle.data.astype(np.float32), tl.float32)
    if handle.dtype.scalar == tl.float32 and precision == "TF32":
        bits = np.ascontiguousarray(handle.data).view(np.uint32)
        return TensorHandle((bits & TF32_BITS).view(np.float32), tl.float32)
    return handle


def _min_dot_size(lhs_type, rhs_type) -> tuple[int, int, int]:
    """The smallest M, N, K that every GPU and every version of Triton compiles."""
    return (1, 1, 32) if lhs_type.scalar.primitive_bitwidth == 8 else (1, 1, 16)


class _InFloat32:
    """Reduce or scan bfloat16 in float32, rounded once at the end."""

    def apply_impl(self, input):
        out = super().apply_impl(tuple(_to_type(x, tl.bfloat16, tl.float32) for x in input))
        out = out if isinstance(out, list | tuple) else (out,)
        return tuple(
            _to_type(y, tl.float32, tl.bfloat16) if x.dtype == tl.bfloat16 else y
            for x, y in zip(input, out, strict=False)
        )


def _to_type(tensor, old, new):
    return tensor.to(new) if tensor.dtype == old else tensor


class DeviceReduce(_InFloat32, stock.ReduceOps):
    """`tl.sum`, `tl.max` and their kin."""


class DeviceScan(_InFloat32, stock.ScanOps):
    """`tl.cumsum` and its kin."""


# -------------------------------------------------------------------------------------------- loops


def device_range(start, stop=None, step=1, **options) -> Iterator[tl.tensor]:
    """`range` and `tl.range` inside a kernel: counts in int32, or int64 where a bound is."""
    start, stop = (0, start) if stop is None else (start, stop)
    bounds = [_scalar(x) for x in (start, stop, 1 if step is None else step)]
    wide = any(isinstance(x, tl.tensor) and x.dtype.primitive_bitwidth == 64 for x in (start, stop))
    wide = wide or any(abs(x) >= 2**31 for x in bounds)
    of, ty = (np.int64, tl.int64) if wide else (np.int32, tl.int32)
    for i in range(*bounds):
        yield tl.tensor(TensorHandle(np.array([i], of), ty), ty)


def _scalar(x) -> int:
    if isinstance(x, tl.tensor):
        return x.handle.data.item()
    return x.value if isinstance(x, tl.constexpr) else int(x)


class _DeviceLoops(stock.ASTTransformer):
    """Loops run over `device_range`; `tl.static_range` unrolls and so keeps Python's integers."""

    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        call = node.iter
        if isinstance(call, ast.Call):
            called = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
            if called == "range":
                call.func = ast.copy_location(ast.Name("device_range", ast.Load()), call.func)
        return node


# ----------------------------------------------------------------------------------------- launches


class _Left:
    """The scope of a patch in Triton 3.5, which takes nothing out again."""

    set_attr = staticmethod(setattr)

    def restore(self) -> None:
        pass


class _PatchOnce:
    """What Triton patches into `triton.language`, once a launch and module, and taken out again."""

    def __init__(self, patch: Callable[[Any], Any]) -> None:
        self._patch = patch
        self._scopes: dict[int, Any] = {}

    def __call__(self, fn: Any) -> _PatchOnce:
        if id(fn.__globals__) not in self._scopes:
            scope = self._scopes[id(fn.__globals__)] = self._patch(fn) or _Left()
            # NumPy 2.4 makes no integer of an array with one entry, as Triton 3.6 asks for.
            scope.set_attr(tl.tensor, "__index__", _scalar)
        return self

    def restore(self) -> None:
        for scope in reversed(self._scopes.values()):
            scope.restore()
        self._scopes.clear()


def _call(self: stock.InterpretedFunction, *args, **kwargs):
    """A kernel calls a device function."""
    stock._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a type, and of sizes: what is made of one name is made once."""
    made: dict[Any, Any] = {}

    def again(type: tl.dtype, *sizes: int) -> Any:
        key = (type.name, sizes)
        if key not in made:
            made[key] = make(type, *sizes)
        return made[key]

    return again


def _share_shapes() -> None:
    """Types and shapes never change: one of each is enough, and most of the time went to them."""
    init_block, init_tensor = tl.block_type.__init__, tl.tensor.__init__

    @_once
    def of_block(element: tl.dtype, *shape: int) -> dict[str, Any]:
        block = object.__new__(tl.block_type)
        init_block(block, element, list(shape))
        return vars(block)

    @_once
    def of_tensor(type: tl.dtype) -> dict[str, Any]:
        tensor = object.__new__(tl.tensor)
        init_tensor(tensor, None, type)
        return vars(tensor)

    def block_type(self, element_ty, shape):
        sizes = (x.value if isinstance(x, tl.constexpr) else x for x in shape)
        vars(self).update(of_block(element_ty, *sizes))

    def tensor(self, handle, type):
        vars(self).update(of_tensor(type))
        self.handle = handle

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    stock._get_np_dtype = _once(stock._get_np_dtype)


def install() -> None:
    """Mend the interpreter of this process; a second call changes nothing."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("this process compiles kernels: use_interpreter() comes first")
    builder = stock.interpreter_builder
    if isinstance(builder, DeviceBuilder):
        return
    builder.__class__ = DeviceBuilder
    builder.options = stock.InterpreterOptions(debug=True, sanitize_overflow=False)
    builder.codegen_fns["min_dot_size"] = _min_dot_size
    stock.ReduceOps, stock.ScanOps = DeviceReduce, DeviceScan
    stock.device_range = device_range
    stock.FunctionRewriter.ast_transformer = _DeviceLoops()
    stock.InterpretedFunction.rewritten_fn.clear()
    stock.InterpretedFunction.__call__ = _call
    stock._patch_lang = _PatchOnce(stock._patch_lang)
    _share_shapes()
    triton.knobs.compilation.front_end_debugging = True  # an error keeps its own type
