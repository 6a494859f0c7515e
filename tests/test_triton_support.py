"""The support finds each fault, computes what a GPU would, and reads machine code right."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from triton_support.interpreter import install
from triton_support.samples import matmul
from triton_support.sanitizer import CHECKS, MemoryFault, sanitize

from benchmarks.machine_code import offline

if torch.cuda.is_available() and not triton.knobs.runtime.interpret:
    pytest.skip("a GPU runs kernels itself", allow_module_level=True)
install()


# ------------------------------------------------------------------------------------------- faults


@triton.jit
def copy_kernel(p_x, p_y, n, extra, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n + extra), mask=o < n)


def copy(x, y=None, n=None, extra=0, programs=4):
    n = x.shape[0] if n is None else n
    y = torch.empty(n) if y is None else y
    copy_kernel[(programs,)](x, y, n, extra, B=32)
    return y


@triton.jit
def increment_kernel(p_x, B: tl.constexpr, ATOMIC: tl.constexpr):
    o = tl.arange(0, B)
    if ATOMIC:
        tl.atomic_add(p_x + o, tl.full([B], 1.0, tl.float32))
    else:
        tl.store(p_x + o, tl.load(p_x + o) + 1.0)


@triton.jit
def overlap_kernel(p_x, B: tl.constexpr):
    tl.store(p_x + tl.program_id(0) * (B - 1) + tl.arange(0, B), 1.0)


@triton.jit
def reverse_kernel(p_x, p_y, B: tl.constexpr, BARRIER: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_x + o, o.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(p_y + o, tl.load(p_x + B - 1 - o))


@triton.jit
def halves_kernel(p_x, B: tl.constexpr, SAME: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_x + o // 2, (o // 2 if SAME else o).to(tl.float32))


@triton.jit
def stride_kernel(p_x, p_y, n, stride, WIDE: tl.constexpr):
    for i in range(n):
        row = i.to(tl.int64) if WIDE else i
        tl.store(p_y + i, tl.load(p_x + row * stride - row * stride))


@triton.jit
def reach_kernel(p_x, p_y, offset):
    tl.store(p_y, tl.load(p_x + offset))


def _uninitialised():
    copy(torch.empty(100))


def _uninitialised_in_part():
    x = torch.empty(100)
    x[:90] = 0
    copy(x)


FAULTS = {
    "bounds-tensor": lambda: copy(torch.zeros(100), extra=1),
    "bounds-before": lambda: reach_kernel[(1,)](torch.zeros(8), torch.zeros(1), -1),
    "bounds-far": lambda: reach_kernel[(1,)](torch.zeros(8), torch.zeros(1), 2**40),
    "bounds-slice": lambda: copy(torch.zeros(200)[:100], extra=1),
    "bounds-gap": lambda: copy(torch.zeros(100, 2)[:, 0]),
    "uninitialised-whole": _uninitialised,
    "uninitialised-part": _uninitialised_in_part,
    "unwritten-tail": lambda: copy(torch.zeros(100), programs=3),
    "race-load-store": lambda: increment_kernel[(2,)](torch.zeros(8), B=8, ATOMIC=False),
    "race-store-store": lambda: overlap_kernel[(2,)](torch.zeros(16), B=8),
    "barrier": lambda: reverse_kernel[(1,)](torch.zeros(8), torch.zeros(8), B=8, BARRIER=False),
    "duplicate": lambda: halves_kernel[(1,)](torch.zeros(8), B=8, SAME=False),
    "overflow": lambda: stride_kernel[(1,)](torch.zeros(1), torch.zeros(3), 3, 2**30, WIDE=False),
}


CRASHES = ("bounds", "overflow")  # of the process itself, where nothing stops them


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name):
    kind = name.split("-")[0]
    with pytest.raises(MemoryFault, match=rf"^\[{kind}\]"), sanitize():
        FAULTS[name]()


@pytest.mark.parametrize("name", [x for x in FAULTS if x.split("-")[0] not in CRASHES])
def test_fault_is_left_alone_where_it_is_not_asked_for(name):
    with sanitize(checks=CHECKS - {name.split("-")[0], "unwritten"}):
        FAULTS[name]()


def test_sound_kernels_pass():
    x = torch.randn(100)
    with sanitize(seed=3) as watch:
        between = torch.empty(100)
        assert torch.equal(copy(copy(x, between)), x)  # what one launch wrote, the next may read
        total = torch.zeros(8)
        increment_kernel[(5,)](total, B=8, ATOMIC=True)
        reverse_kernel[(1,)](torch.empty(8), torch.empty(8), B=8, BARRIER=True)
        half = torch.zeros(4)
        halves_kernel[(1,)](half, B=8, SAME=True)
        stride_kernel[(1,)](torch.zeros(1), torch.zeros(3), 3, 2**30, WIDE=True)
        filled = torch.empty(100)
        filled.normal_()
        copy(filled)
        copy(torch.zeros(0), torch.zeros(0), programs=1)
    assert watch.launches == 8
    assert total.tolist() == [5.0] * 8
    assert half.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_fault_names_argument_program_and_place():
    place = r"launch 1, program \(3, 0, 0\) of \(4, 1, 1\): load of p_x, byte 400 of 400, 1 of 5"
    with pytest.raises(MemoryFault, match=place), sanitize():
        copy(torch.zeros(100), extra=1)


def test_the_interpreter_is_itself_again_after_a_fault():
    make = torch.empty
    with pytest.raises(MemoryFault), sanitize():
        copy(torch.empty(100))
    assert torch.empty is make
    copy(torch.zeros(200)[:100], extra=1)


def test_scratch_need_not_be_full():
    with sanitize(partial={"p_y"}):
        copy(torch.zeros(100), programs=3)


def test_unknown_check_is_refused():
    with pytest.raises(ValueError, match="takes"), sanitize(checks={"bound"}):
        pass


@triton.jit
def order_kernel(p_next, p_order):
    here = tl.load(p_next)
    tl.store(p_order + here, tl.program_id(0) * 2 + tl.program_id(1))
    tl.store(p_next, here + 1)


def _order(seed):
    order = torch.zeros(8, dtype=torch.int32)
    with sanitize(seed=seed, checks={"overflow"}):
        order_kernel[(4, 2)](torch.zeros(1, dtype=torch.int32), order)
    return order.tolist()


def test_seed_shuffles_programs():
    assert _order(None) == list(range(8))
    assert _order(1) == _order(1)
    assert _order(1) != _order(2)
    assert sorted(_order(1)) == list(range(8))


@triton.jit
def masked_kernel(p_x, p_y, n, B: tl.constexpr):
    o = tl.arange(0, B)
    scalar = tl.load(p_x, mask=n < 0, other=0.0)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n) + scalar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_off_lanes_hold_no_value(dtype):
    y = torch.zeros(8, dtype=dtype)
    with sanitize():
        masked_kernel[(1,)](torch.ones(8, dtype=dtype), y, 4, B=8)
    assert y[:4].tolist() == [1.0] * 4 and y[4:].isnan().all()


# -------------------------------------------------------------------------------------- numbers


@triton.jit
def arithmetic_kernel(p_x, p_y, p_o, n, B: tl.constexpr):
    o = tl.arange(0, B)
    b_x = tl.load(p_x + o, mask=o < n, other=1.0)
    b_y = tl.load(p_y + o, mask=o < n, other=1.0)
    p_o += o
    tl.store(p_o, b_x + b_y)
    tl.store(p_o + B, b_x * b_y)
    tl.store(p_o + 2 * B, b_x - 0.1)
    tl.store(p_o + 3 * B, tl.abs(b_x))
    tl.store(p_o + 4 * B, -b_x)
    tl.store(p_o + 5 * B, tl.where(b_x < b_y, b_x, b_y))
    tl.store(p_o + 6 * B, tl.minimum(b_x, b_y))
    tl.store(p_o + 7 * B, tl.max(b_x, 0) + tl.zeros([B], b_x.dtype))
    tl.store(p_o + 8 * B, tl.full([B], 0.1, b_x.dtype))
    tl.store(p_o + 9 * B, b_x.to(tl.float16).to(b_x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arithmetic_is_torchs(dtype):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, generator=g).to(dtype) for _ in range(2))
    o = torch.zeros(10, 64, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, o, 64, B=64)
    want = torch.stack(
        [
            x + y,
            x * y,
            x - torch.tensor(0.1, dtype=dtype),
            x.abs(),
            -x,
            torch.where(x < y, x, y),
            torch.minimum(x, y),
            x.max().expand(64),
            torch.full((64,), 0.1, dtype=dtype),
            x.half().to(dtype),
        ]
    )
    if dtype == torch.float64:
        want[8] = torch.tensor(0.1, dtype=torch.float64)
    for row, (got, expected) in enumerate(zip(o, want, strict=True)):
        assert torch.equal(got, expected), row


@triton.jit
def cast_kernel(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o).to(p_y.dtype.element_ty))


def test_rounding_to_bfloat16_is_torchs():
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=g, dtype=torch.int64)
    bits = bits.to(torch.int32)
    bits[::3] = bits[::3] & ~0xFFFF | 0x8000  # ties
    bits[:4] = torch.tensor([0x7F800001, 0x7F7FFFFF, 0x00008000, 0x7F800000])
    x = bits.view(torch.float32)
    y = torch.zeros(4096, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, B=4096)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(), x.bfloat16().nan_to_num())
    back = torch.zeros(4096)
    cast_kernel[(1,)](y, back, B=4096)
    assert torch.equal(back.nan_to_num(), y.float().nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dot_is_torchs(dtype):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=g).to(dtype) for s in ((32, 64), (64, 16)))
    o, exact = matmul(a, b), a.double() @ b.double()
    assert o.dtype == dtype
    # Sums in float32 or better, then one rounding: half a unit of the dtype, and little more.
    rounding = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0
    sums = 1e-14 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(o.double(), exact, rtol=rounding, atol=sums)


def test_dot_in_tf32_sees_ten_bits():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(s, generator=g) for s in ((32, 64), (64, 16)))
    cut = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (a, b)]
    torch.testing.assert_close(matmul(a, b, "tf32").double(), cut[0] @ cut[1], rtol=0, atol=1e-5)


@triton.jit
def small_dot_kernel(p_x, B: tl.constexpr):
    o = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    b_x = tl.load(p_x + o)
    tl.store(p_x + o, tl.dot(b_x, b_x))


def test_product_too_small_for_a_gpu_is_refused():
    with pytest.raises(AssertionError, match="K >= 16"):
        small_dot_kernel[(1,)](torch.zeros(8, 8), B=8)


@triton.jit
def loops_kernel(p_x, n):
    for i in tl.range(0, n, num_stages=1):
        tl.store(p_x + i.to(tl.int64), i * 2)
    for i in range(n - 1, -1, -1):
        tl.store(p_x + n + i.to(tl.int64), i)
    for i in tl.static_range(3):
        tl.store(p_x + 2 * n + i, i)


def test_loop_variables_are_tensors():
    x = torch.zeros(11, dtype=torch.int32)
    loops_kernel[(1,)](x, 4)
    assert x.tolist() == [0, 2, 4, 6, 0, 1, 2, 3, 0, 1, 2]


@triton.jit
def assert_kernel(p_x):
    tl.device_assert(tl.load(p_x) > 0, "not positive")


def test_device_assert_raises():
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(AssertionError, match="not positive"):
        assert_kernel[(1,)](torch.zeros(1))


# -------------------------------------------------------------------------------------- compiling

LAUNCH = "triton_support.samples:launch_matmul"


@pytest.fixture(scope="module")
def compiled():
    found = offline.collect(LAUNCH, offline.ARCHITECTURES, [{}, {"offset": 1}])
    return {(r.arch, ("aligned", "unaligned")[i % 2]): r for i, r in enumerate(found)}


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")],
)
def test_compiled_matmul_makes_sense(compiled, arch, instruction):
    plain, unaligned = compiled[arch, "aligned"], compiled[arch, "unaligned"]
    assert plain.kernel == "matmul_kernel" and plain.arch == arch and plain.num_warps == 4
    assert plain.constants == {"BM": "64", "BN": "64", "BK": "32", "PRECISION": "ieee"}
    assert [name for name in plain.tensor_core if name.startswith(instruction)], plain
    assert plain.products >= 2 and 16 <= plain.registers <= 255
    assert 4096 <= plain.shared <= 65_536
    assert (plain.tensor_memory == 64) == (arch == "sm_100")
    assert plain.instructions > 100 and plain.spills == 0
    assert plain.faults() == []
    assert set(plain.loads) == {16} and max(plain.stores) == (8 if arch == "gfx942" else 16)
    assert 2 in unaligned.loads and unaligned.products


@pytest.mark.parametrize(
    ("arch", "case", "instruction"),  # multiplications of a tensor-core instruction, in a warp
    [
        ("sm_80", "aligned", 16 * 8 * 16),
        ("sm_80", "unaligned", 16 * 8 * 16),
        ("sm_90", "aligned", 64 * 64 * 16 // 4),
        ("sm_100", "aligned", 64 * 64 * 16 // 4),  # counted in all four, issued by one
        ("gfx942", "unaligned", 32 * 32 * 8),
    ],
)
def test_executed_matmul(compiled, arch, case, instruction):
    """64 x 64 x 128 in turns of 32: what the source's loop needs, the machine code's does, once."""
    report = compiled[arch, case]
    assert report.flop == report.needed == 2 * 64 * 64 * 128
    assert report.executed["product"] == 64 * 64 * 128 / instruction
    # The result is rounded at the end: 32 threads two numbers at a time, or 64 threads one.
    assert report.executed["float"] == 64 * 64 / 64


def test_faults_of_a_tile_that_is_too_large():
    case, launch = {"M": 128, "N": 256}, "triton_support.samples:launch_two_sums"
    [spilled, gave_up] = offline.collect(launch, ["sm_90", "sm_100"], [case])
    assert spilled.products and spilled.spills > 0
    [fault] = spilled.faults()
    assert fault == f"two_sums_kernel on sm_90: {spilled.stack:,} bytes of stack, at most 0"
    assert spilled.faults(stack=spilled.stack) == []
    assert gave_up.tensor_memory > 512 and gave_up.traps == 1 and not gave_up.products
    assert len(gave_up.faults()) == 2


def test_faults_of_shared_memory(compiled):
    plain = compiled["sm_80", "aligned"]
    full = dataclasses.replace(plain, shared=166_912)
    assert full.faults() == []
    assert dataclasses.replace(plain, shared=166_913).faults() == [
        "matmul_kernel on sm_80: 166,913 bytes of shared memory, at most 166,912"
    ]


def test_launch_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match="did not compile"):
        offline.collect(LAUNCH, ["sm_90"], [{"dtype": "no_such_dtype"}])


def test_an_interpreting_process_does_not_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), offline.compiling("sm_90"):
        pass
