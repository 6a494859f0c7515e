"""PTX's opcodes that need no more than their operands: which operation of the core each is."""

from __future__ import annotations

WIDTH = {"pred": 1, "f16x2": 32, "bf16x2": 32, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)
}
COMPARISON = {
    name: number
    for number, names in enumerate(
        [
            "eq",
            "ne",
            "lt,lo",
            "le,ls",
            "gt,hi",
            "ge,hs",
            "equ",
            "neu",
            "ltu",
            "leu",
            "gtu",
            "geu",
            "num",
            "nan",
        ]
    )
    for name in names.split(",")
}
HALF = dict(add=0, sub=1, mul=2, min=3, max=4)
VOTE = dict(any=0, all=1, ballot=2)
SHUFFLE = dict(up=0, down=1, bfly=2, idx=3)
# What changes no value and orders nothing that the emulator leaves unordered.
SKIPPED = (
    "prefetch",
    "discard",
    "applypriority",
    "griddepcontrol",
    "membar",
    "bar.warp.sync",
    "fence.sc",
    "fence.acq_rel",
    "nanosleep",
)

SIMPLE: dict[str, str] = {}


def _say(operation: str, *opcodes: str) -> None:
    SIMPLE.update(dict.fromkeys(opcodes, operation))


def _integers() -> None:
    for bits in (16, 32, 64):
        for t in (f"b{bits}", f"s{bits}", f"u{bits}"):
            _say(f"add{bits}", f"add.{t}")
            _say(f"sub{bits}", f"sub.{t}")
            _say(f"mul{bits}", f"mul.lo.{t}")
            _say(f"not{bits}", f"not.{t}")
            _say(f"shl{bits}", f"shl.{t}")
            for op in ("and", "or", "xor"):  # 16 bits are kept in 32, the upper half zero
                _say(f"{op}{max(bits, 32)}", f"{op}.{t}")
            if bits > 16:
                _say(f"mad{bits}", f"mad.lo.{t}")
                _say(f"neg{bits}", f"neg.{t}")
        _say(f"shr_u{bits}", f"shr.u{bits}", f"shr.b{bits}")
        _say(f"shr_s{bits}", f"shr.s{bits}")
        for sign in "us":
            t = f"{sign}{bits}"
            _say(f"mulhi_{t}", f"mul.hi.{t}")
            if bits < 64:
                _say(f"mulw_{t}", f"mul.wide.{t}")
                _say(f"madw_{t}", f"mad.wide.{t}")
            if bits > 16:
                for op in ("div", "rem", "min", "max"):
                    _say(f"{op}_{t}", f"{op}.{t}")
    for op in ("and", "or", "xor", "not"):
        _say(f"{op}p", f"{op}.pred")
    for op in ("abs.s32", "abs.s64", "bfe.u32", "bfe.s32", "bfe.u64"):
        _say(op.replace(".", "_"), op)
    _say("bfi32", "bfi.b32")
    _say("prmt", "prmt.b32")
    _say("popc32", "popc.b32")
    _say("clz32", "clz.b32")
    _say("brev32", "brev.b32")
    _say("shfl_wrap", "shf.l.wrap.b32")
    _say("shfr_wrap", "shf.r.wrap.b32")
    _say("selp64", *(f"selp.{t}" for t in ("b64", "u64", "s64", "f64")))
    narrow = ("b32", "f32", "s32", "u32", "b16", "u16", "s16", "f16")
    _say("selp32", *(f"selp.{t}" for t in narrow))


def _floats() -> None:
    for f in ("", ".rn"):
        for op, single, double in (
            ("add", "addf", "addd"),
            ("sub", "subf", "subd"),
            ("mul", "mulf", "muld"),
            ("fma", "fmaf_", "fmad"),
        ):
            _say(single, f"{op}{f}.f32")
            _say(double, f"{op}{f}.f64")
        _say("divf", f"div{f}.f32")
    _say("negf", "neg.f32")
    _say("absf", "abs.f32")
    _say("divf", "div.full.f32", "div.approx.f32")
    # Approximations are computed to the last bit: within any error that PTX states for them.
    _say("ex2f", "ex2.approx.f32", "ex2.approx.ftz.f32")
    _say("lg2f", "lg2.approx.f32", "lg2.approx.ftz.f32")
    _say("rcpf", "rcp.approx.f32", "rcp.approx.ftz.f32", "rcp.rn.f32")
    _say("sqrtf_", "sqrt.approx.f32", "sqrt.approx.ftz.f32", "sqrt.rn.f32")
    _say("rsqrtf_", "rsqrt.approx.f32", "rsqrt.approx.ftz.f32")
    _say("tanhf_", "tanh.approx.f32")
    _say("copysignf_", "copysign.f32")
    for op in ("neg", "abs"):
        _say(f"{op}bf", f"{op}.bf16", f"{op}.f16")
        _say(f"{op}bf2", f"{op}.bf16x2", f"{op}.f16x2")


_integers()
_floats()

CONVERSION = {
    "cvt.f32.bf16": "cvt_f32_bf16",
    "cvt.f32.f16": "cvt_f32_f16",
    "cvt.rn.bf16.f32": "cvt_bf16_f32",
    "cvt.rn.f16.f32": "cvt_f16_f32",
    "cvt.rn.bf16x2.f32": "cvt_bf16x2",
    "cvt.rn.f16x2.f32": "cvt_f16x2",
    "cvt.rn.f32.s32": "cvt_f32_s32",
    "cvt.rn.f32.u32": "cvt_f32_u32",
    "cvt.rn.f32.s64": "cvt_f32_s64",
    "cvt.rn.f32.u64": "cvt_f32_u64",
    "cvt.rzi.s32.f32": "cvt_s32_f32",
    "cvt.f64.f32": "cvt_f64_f32",
    "cvt.rn.f32.f64": "cvt_f32_f64",
    "cvt.rna.tf32.f32": "cvt_tf32",
    "cvt.rmi.f32.f32": "cvt_floor",
}
