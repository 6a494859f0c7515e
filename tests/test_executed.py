"""What a kernel executes is counted right: loops, how often they turn, kinds, products."""

import pytest

from benchmarks.machine_code import executed, loops
from benchmarks.machine_code.loops import Loop

# ------------------------------------------------------------------------------------ machine code


def _lines(*groups):
    """SASS, a label or so many instructions of a name at a time."""
    text, address = "        .text.kernel:\n", 0
    for group in groups:
        if isinstance(group, str):
            text += f"{group}:\n"
            continue
        count, instruction = group
        for _ in range(count):
            text += f"        /*{address:04x}*/                   {instruction} ;\n"
            address += 16
    return text


# A nest of two, a loop behind it, and all that is around them. Turns 3, 5 and 7.
NEST = _lines(
    (4, "IMAD.MOV.U32 R1, RZ, RZ, R2"),
    (1, "@!P0 EXIT"),
    ".L_x_0",
    (6, "LDG.E.128 R4, desc[UR4][R2.64]"),
    (3, "STL [R1], R4"),
    ".L_x_1",
    (10, "FFMA R4, R4, R5, R6"),
    (1, "@P1 BRA `(.L_x_2)"),  # over what few turns do
    (2, "MUFU.EX2 R4, R4"),
    ".L_x_2",
    (2, "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24"),
    (1, "BAR.SYNC.DEFER_BLOCKING 0x0"),
    (1, "@P2 BRA `(.L_x_1)"),
    (8, "STS.128 [R1], R4"),
    (1, "@!P3 BRA `(.L_x_0)"),
    ".L_x_3",
    (13, "STG.E desc[UR4][R2.64], R4"),
    (1, "BRA.U !UP0, `(.L_x_3)"),
    (1, "EXIT"),
    ".L_x_4",
    (1, "BRA `(.L_x_4)"),  # what the assembler puts behind every function
    (5, "NOP"),
)
INNER = 10 + 1 + 2 + 2 + 1 + 1
SOURCE = [Loop(0, 3), Loop(1, 5), Loop(0, 7)]


def test_nest():
    found = executed.executed(executed.sass(NEST), SOURCE)
    assert found.instructions == {
        "product": 3 * 5 * 2,
        "shared": 3 * 8,
        "global": 3 * 6 + 7 * 13,
        "integer": 4,
        "float": 3 * 5 * 10,
        "special": 3 * 5 * 2,
        "wait": 3 * 5,
        "spill": 3 * 3,
        "control": 1 + 3 * 5 * 2 + 3 + 7 + 1,
    }
    assert sum(found.instructions.values()) == 6 + 3 * (18 + 5 * INNER) + 7 * 14
    # A warp has a quarter of its warp group's product.
    assert found.flop == 3 * 5 * 2 * 2 * 64 * 32 * 16 / 4


WAITS = _lines(
    ".L_x_0",
    (12, "FADD R1, R1, R2"),
    (2, "@!PT LDS RZ, [RZ]"),  # which loads nothing
    ".L_x_1",
    (2, "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R1], R2"),
    (1, "@!P1 BRA `(.L_x_1)"),
    (1, "@P2 BRA `(.L_x_5)"),  # to what is out of the way, and back into the loop
    ".L_x_2",
    (1, "@P0 BRA `(.L_x_0)"),
    (1, "CALL.REL.NOINC `($kernel$divide)"),
    (1, "EXIT"),
    ".L_x_5",
    (3, "MUFU.RCP R1, R2"),
    (1, "BRA `(.L_x_2)"),
    "$kernel$divide",
    (4, "LOP3.LUT R1, R2, R3, RZ, 0xc0, !PT"),
    (1, "RET.REL.NODEC R2 `(kernel)"),
)


def test_waits_cold_code_and_calls():
    """What waits has no turns; blocks behind the end belong to the loop that goes through them."""
    found = executed.executed(executed.sass(WAITS), [Loop(0, 10)]).instructions
    assert (found["float"], found["special"], found["integer"]) == (10 * 12, 10 * 3, 4)
    assert found["wait"] == 10 * 2
    assert found["control"] == 10 * (2 + 1 + 1 + 1 + 1) + 1 + 1 + 1
    assert sum(found.values()) == 10 * (12 + 2 + 3 + 1 + 1 + 4) + 2 + 5


@pytest.mark.parametrize(
    "source", [[], SOURCE[:2], [Loop(0, 3), Loop(0, 5), Loop(0, 7)], [*SOURCE, Loop(0, 2)]]
)
def test_loops_are_those_of_the_source(source):
    with pytest.raises(ValueError, match="loops of depths"):
        executed.executed(executed.sass(NEST), source)


TWO_HEADS = _lines(
    (1, "@P0 BRA `(.L_x_1)"),  # the first turn may begin with the loop's second half
    ".L_x_0",
    (8, "FADD R1, R1, R2"),
    ".L_x_1",
    (7, "MUFU.EX2 R4, R4"),
    (1, "@P1 BRA `(.L_x_1)"),
    (1, "@P2 BRA `(.L_x_0)"),
    (1, "EXIT"),
)


def test_a_loop_may_be_entered_at_two_places():
    found = executed.executed(executed.sass(TWO_HEADS), [Loop(0, 4)]).instructions
    assert (found["float"], found["special"], found["control"]) == (4 * 8, 4 * 7, 1 + 4 * 2 + 1)


def test_a_loop_of_one_turn_may_be_none():
    """Here the outer one, whose end the compiler knew; what it held is a level higher."""
    found = executed.executed(executed.sass(NEST), [Loop(0, 3), Loop(1, 5), Loop(0, 1), Loop(1, 7)])
    assert found == executed.executed(executed.sass(NEST), SOURCE)


PTX = """
.visible .entry kernel(
	.param .u32 kernel_param_0
)
.reqntid 128
{
	.reg .pred 	%p<3>;
	.loc	1 20 30
// %bb.0:
	ld.param.b32 	%r1, [kernel_param_0];
	@%p1 bra 	$L__BB0_3;
$L__BB0_1:                              // =>This Inner Loop Header: Depth=1
	// begin inline asm
	mov.u32 %r2, 0x0;
	@%p2 ld.global.v4.b32 { %r2, %r3,
	%r4, %r5 }, [ %rd1 + 0 ];
	// end inline asm
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r6 }, { %r2 }, { %r3 }, { %r6 };
	fma.rn.f32 %r6, %r6, %r2, %r3; fma.rn.f32 %r7, %r6, %r2, %r3;
	ex2.approx.f32 %r7, %r7;
	add.s32 %r8, %r8, 1;
	add.s32 %r9, %r9, 1;
	add.s32 %r10, %r10, 1;
	add.s32 %r11, %r11, 1;
	setp.lt.s32 %p1, %r8, %r1;
	bar.sync 	0;
	@%p1 bra 	$L__BB0_1;
	bra.uni 	$L__BB0_3;
$L__BB0_2:
	trap;
$L__BB0_3:
	ret;
}
	.file	1 "kernel.py"
"""


def test_ptx():
    """Statements as they end, not lines; what nothing reaches does not count."""
    code = executed.ptx(PTX)
    times = dict.fromkeys(x.name for x in code.instructions)
    for instruction, n in zip(code.instructions, executed.turns(code, [Loop(0, 6)]), strict=True):
        times[instruction.name] = (times[instruction.name] or 0) + n
    assert times == {
        "ld.param.b32": 1,
        "bra": 1 + 6,
        "mov.u32": 6,
        "ld.global.v4.b32": 6,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 6,
        "fma.rn.f32": 12,
        "ex2.approx.f32": 6,
        "add.s32": 24,
        "setp.lt.s32": 6,
        "bar.sync": 6,
        "bra.uni": 1,
        "trap": 0,
        "ret": 1,
    }


GCN = """
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 20 30
	global_load_dwordx4 v[0:3], v4, s[0:1]
	s_waitcnt vmcnt(0)
	ds_write_b128 v5, v[0:3]
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_exp_f32_e32 v6, v6
	v_pk_mul_f32 v[6:7], v[6:7], v[8:9]
	v_fma_f32 v6, v6, v7, v8
	v_add_u32_e32 v4, 16, v4
	v_lshl_add_u64 v[4:5], v[4:5], 0, s[0:1]
	scratch_store_dword off, v6, off
	s_add_i32 s2, s2, 1
	s_cmp_lt_i32 s2, s3
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_3
.LBB0_2:
	s_nop 0
.LBB0_3:
	s_endpgm
"""


def test_gcn():
    found = executed.executed(executed.gcn(GCN), [Loop(0, 6)])
    assert found.instructions == {
        "product": 12,
        "shared": 6,
        "global": 1 + 6,
        "integer": 6 * 4,
        "float": 6 * 2,
        "special": 6,
        "wait": 6,
        "spill": 6,
        "control": 1 + 6 + 1 + 1,
    }
    assert found.flop == 6 * 2 * (32 * 32 * 8 + 16 * 16 * 16)


@pytest.mark.parametrize(
    ("name", "kind", "flop"),
    [
        ("HMMA.16816.F32.BF16", "product", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", "product", 2 * 16 * 8 * 8),
        ("HGMMA.64x256x16.F32", "product", 2 * 64 * 256 * 16 / 4),
        ("HGMMA.64x16x8.F32.TF32", "product", 2 * 64 * 16 * 8 / 4),
        ("UTCHMMA", "product", 0),
        ("v_mfma_f32_16x16x16_bf16", "product", 2 * 16**3),
        ("v_mfma_f32_32x32x8_f16", "product", 2 * 32 * 32 * 8),
        ("v_mfma_f32_32x32x2f32", "product", 2 * 32 * 32 * 2),
        ("v_mfma_f32_4x4x4_16b_f16", "product", 0),
        ("LDSM.16.M88.4", "shared", 0),
        ("SHFL.BFLY", "shared", 0),
        ("LDTM.x16", "shared", 0),
        ("LDGSTS.E.BYPASS.128", "global", 0),
        ("IMAD.WIDE.U32", "integer", 0),
        ("R2UR", "integer", 0),
        ("F2FP.BF16.F32.PACK_AB", "float", 0),
        ("FSETP.GT.AND", "float", 0),
        ("MUFU.RSQ", "special", 0),
        ("WARPGROUP.DEPBAR.LE", "wait", 0),
        ("LDGDEPBAR", "wait", 0),
        ("LDL.64", "spill", 0),
        ("BSSY", "control", 0),
    ],
)
def test_kinds(name, kind, flop):
    assert executed.kind(name) == kind and kind in executed.CLASSES
    assert executed.flop(name) == flop


# ------------------------------------------------------------------------------------------ the IR

IR = """
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%p_x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("p_x"(#loc)), %blocks: i32 loc("blocks"(#loc)), %p_n: !tt.ptr<i64> loc("p_n"(#loc)), %hidden: i32 {tt.divisibility = 16 : i32} loc("hidden"(#loc))) attributes {noinline = false} {
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c15_i32 = arith.constant 15 : i32 loc(#loc1)
    %c16_i32 = arith.constant 16 : i32 loc(#loc1)
    %c100_i32 = arith.constant 100 : i32 loc(#loc1)
    %true = arith.constant true loc(#loc1)
    %cst = arith.constant dense<0.000000e+00> : tensor<64x32xf32> loc(#loc1)
    scf.for %i = %c0_i32 to %blocks step %c1_i32  : i32 {
      %n = tt.load %p_n : !tt.ptr<i64> loc(#loc2)
      %left = arith.subi %n, %c16_i32 : i32 loc(#loc2)
      %count = arith.minsi %left, %c100_i32 : i32 loc(#loc2)
      %some = arith.cmpi sgt, %count, %c0_i32 : i32 loc(#loc2)
      scf.if %some {
        %up = arith.addi %count, %c15_i32 : i32 loc(#loc3)
        %chunks = arith.divsi %up, %c16_i32 : i32 loc(#loc3)
        %b = scf.for %r = %c0_i32 to %chunks step %c1_i32 iter_args(%acc = %cst) -> (tensor<64x32xf32>)  : i32 {
          %d = tt.dot %x, %y, %acc, inputPrecision = tf32 : tensor<64x16xbf16> * tensor<16x32xbf16> -> tensor<64x32xf32> loc(#loc4)
          %s = "tt.reduce"(%d) <{axis = 0 : i32}> ({
          ^bb0(%u: f32 loc("u"), %v: f32 loc("v")):
            %w = arith.addf %u, %v : f32 loc(#loc5)
            tt.reduce.return %w : f32 loc(#loc5)
          }) : (tensor<64x32xf32>) -> tensor<32xf32> loc(#loc5)
          scf.yield %d : tensor<64x32xf32> loc(#loc4)
        } {tt.num_stages = 1 : i32} loc(#loc3)
      } loc(#loc2)
      %last = arith.addi %i, %c1_i32 : i32 loc(#loc6)
      %more = arith.cmpi slt, %last, %blocks : i32 loc(#loc6)
      %k = scf.if %more -> (i32) {
        scf.yield %hidden : i32 loc(#loc6)
      } else {
        %d = tt.dot %x, %y, %cst : tensor<64x16xbf16> * tensor<16x32xbf16> -> tensor<64x32xf32> loc(#loc4)
        scf.yield %c0_i32 : i32 loc(#loc6)
      } loc(#loc6)
      %until = arith.select %more, %k, %c0_i32 : i32 loc(#loc6)
      scf.for %i_0 = %c0_i32 to %until step %c16_i32  : i32 {
        %d = tt.dot %x, %y, %cst : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32> loc(#loc4)
      } loc(#loc6)
    } loc(#loc1)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""  # noqa: E501


def test_turns_of_the_source():
    """What is loaded is as large as it may be; a side that is not taken needs no products."""
    source = loops.read(IR, [3, 250])
    assert source.loops == [Loop(0, 3), Loop(1, 7), Loop(1, 16)]
    assert source.flop == 3 * (7 * 2 * 64 * 16 * 32 + 16 * 2 * 16**3)
    last = loops.read(IR, [1, 250])  # nothing comes behind it
    assert last.loops == [Loop(0, 1), Loop(1, 7), Loop(1, 0)]
    assert last.flop == 7 * 2 * 64 * 16 * 32 + 2 * 64 * 16 * 32


def test_what_nothing_tells():
    with pytest.raises(ValueError, match="1 integers for %blocks, %hidden"):
        loops.read(IR, [3])
    with pytest.raises(ValueError, match=r"bounds that nothing tells: %b = scf\.for %r"):
        loops.read(IR.replace("arith.minsi %left", "arith.maxsi %left"), [3, 250])
    with pytest.raises(ValueError, match="a while loop"):
        loops.read(IR.replace("scf.for %r", "scf.while %r"), [3, 250])
