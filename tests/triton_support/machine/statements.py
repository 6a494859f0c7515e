"""One statement of PTX to one instruction of the core: an opcode, its modifiers, its operands."""

from __future__ import annotations

import re

from .opcodes import COMPARISON, CONVERSION, HALF, SHUFFLE, SIMPLE, SKIPPED, VOTE, WIDTH

SIGNED, WIDE, NON_COHERENT = 2, 4, 1  # bits of a load's or store's `aux2`


class Unsupported(Exception):
    """PTX that the emulator does not execute."""


def decode(d, op: str, a: list[str]) -> None:
    """Emit what a statement does, with the decoder `d`."""
    family = op.split(".")[0]
    if op in ("bra", "bra.uni"):
        d.jumps.append((len(d.code), a[0]))
        d.emit("bra", [])
    elif op in ("ret", "exit"):
        d.emit("ret", [])
    elif op in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
        if a != ["0"]:
            raise Unsupported("a barrier of some of the warps")
        d.emit("bar", [])
    elif op.startswith("fence.proxy.async"):
        d.emit("fenceproxy", [])
    elif op.startswith(SKIPPED):
        pass
    elif op.startswith("createpolicy"):
        d.emit("mov64", [d.operand(a[0], 64), d.constant(0, 64)])
    elif op.startswith("cvta"):
        d.emit("mov64", [d.operand(x, 64) for x in a])
    elif op in SIMPLE:
        _simple(d, op, a)
    else:
        _FAMILIES.get(family, _unknown)(d, op, a)


def _unknown(d, op, a):
    raise Unsupported(op)


def _simple(d, op, a):
    name, kind = SIMPLE[op], op.rsplit(".", 1)[-1]
    mixed = name.startswith(("mulw", "madw", "selp", "shl", "shr", "bfe", "bfi"))
    widths = {d.widths[x] for x in a if x in d.widths}
    if not mixed and len(widths) > 1:
        raise Unsupported("registers of several widths")
    w = 1 if kind == "pred" else WIDTH[kind]
    each = [w] * len(a)
    if name.startswith(("shl", "shr")) and "wrap" not in name:
        each = [w, w, 32]
    elif name.startswith("mulw"):
        each = [2 * w, w, w]
    elif name.startswith("madw"):
        each = [2 * w, w, w, 2 * w]
    elif name.startswith("selp"):
        each[3] = 1
    elif name.startswith("bfe"):
        each = [w, w, 32, 32]
    d.emit(name, [d.operand(x, width) for x, width in zip(a, each, strict=True)])


def _mov(d, op, a):
    w = WIDTH[op.split(".")[-1]]
    if "{" not in a[0] + a[1]:
        name = "movp" if w == 1 else "mov64" if w == 64 else "mov32"
        return d.emit(name, [d.operand(x, w) for x in a])
    one, pair = (a[0], a[1]) if "{" in a[1] else (a[1], a[0])
    halves = d.vector(pair, w // 2)
    if len(halves) != 2 or w not in (32, 64):
        raise Unsupported("a vector of other than two halves")
    if pair is a[1]:
        return d.emit(f"pack{w // 2}", [d.operand(one, w), *halves])
    sinks = [x if x >= 0 else d.slot(("sink",)) for x in halves]
    return d.emit(f"unpack{w // 2}", [*sinks, d.operand(one, w)])


def _arithmetic(d, op, a):
    """Of halves, one or two in a register, and float32 min and max."""
    family, *_, kind = op.split(".")
    if kind == "f32" and family in ("min", "max"):
        return d.emit(family + "f", [d.operand(x, 32) for x in a], aux=int(".NaN" in op))
    if kind not in ("f16", "bf16", "f16x2", "bf16x2"):
        raise Unsupported(op)
    pair = "2" if kind.endswith("x2") else ""
    half = int(kind.startswith("f16"))
    operands = [d.operand(x, 32) for x in a]
    if family == "fma":
        return d.emit(f"fma_h{pair}", operands, aux2=half)
    return d.emit(f"bin_h{pair}", operands, aux=HALF[family], aux2=half)


def _lop3(d, op, a):
    d.emit("lop3", [d.operand(x, 32) for x in a[:4]], imm=int(a[4], 0))


def _setp(d, op, a):
    _, comparison, *more, kind = op.split(".")
    boolean = next((("and", "or", "xor").index(x) + 1 for x in more if x != "ftz"), 0)
    equal = comparison in ("eq", "ne")
    kind = {"b32": "s32" if equal else "u32", "b64": "s64", "b16": "u16"}.get(kind, kind)
    if "|" in a[0]:
        raise Unsupported("two predicates")
    w = WIDTH[kind]
    operands = [d.operand(a[0], 1), d.operand(a[1], w), d.operand(a[2], w)]
    operands += [d.operand(a[3], 1)] if boolean else []
    d.emit(f"setp_{kind}", operands, aux=COMPARISON[comparison], aux2=boolean)


def _cvt(d, op, a):
    *modifiers, to, of = op.split(".")[1:]
    whole = re.compile(r"[usb]\d+")
    if whole.fullmatch(to) and whole.fullmatch(of) and not modifiers:
        # Registers may be wider than the types.
        wide, narrow = d.widths[a[0]], d.widths.get(a[1], WIDTH[of])
        flags = 256 * (of[0] == "s") | 512 * (narrow == 64) | 1024 * (wide == 64)
        flags |= 2048 * (to[0] == "s") | WIDTH[of]
        operands = [d.operand(a[0], wide), d.operand(a[1], narrow)]
        return d.emit("cvt_int", operands, aux=flags, aux2=WIDTH[to])
    widths = [64 if to.endswith("64") else 32] + [64 if of.endswith("64") else 32] * (len(a) - 1)
    return d.emit(CONVERSION[op], [d.operand(x, w) for x, w in zip(a, widths, strict=True)])


def _shfl(d, op, a):
    value, _, valid = a[0].partition("|")
    predicate = d.operand(valid, 1) if valid else -1
    operands = [d.operand(value, 32), predicate, *(d.operand(x, 32) for x in a[1:])]
    d.emit("shfl", operands, aux=SHUFFLE[op.split(".")[2]])


def _vote(d, op, a):
    mode = op.split(".")[2]
    operands = [d.operand(a[0], 32 if mode == "ballot" else 1), d.operand(a[1].lstrip("!"), 1)]
    d.emit("vote", operands, aux=VOTE[mode], aux2=int(a[1].startswith("!")))


def address(text: str) -> tuple[str, int]:
    """[base + offset]"""
    m = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text.strip())
    if not m:
        raise Unsupported(f"address {text}")
    return m[1], int(m[2] or "0", 0)


_KNOWN = set(
    [
        "ld",
        "st",
        "global",
        "shared",
        "shared::cta",
        "v2",
        "v4",
        "v8",
        "nc",
        "ca",
        "cg",
        "cs",
        "wb",
        "L1::evict_last",
        "L1::evict_first",
        "L1::no_allocate",
        "L2::cache_hint",
        "relaxed",
        "acquire",
        "release",
        "gpu",
        "volatile",
    ]
)


def _access(d, op, a):
    """ld and st: any width, vectors, registers wider than what is read."""
    words = op.split(".")
    load, space, kind = words[0] == "ld", words[1], words[-1]
    value, place = (a[0], a[1]) if load else (a[1], a[0])
    n = next((int(x[1:]) for x in words if re.fullmatch(r"v\d", x)), 1)
    w, (base, offset) = WIDTH[kind], address(place)
    flags = WIDE * d.wide(value) | SIGNED * (load and kind[0] == "s")
    registers = d.vector(value, 64 if d.wide(value) else w)
    if len(registers) != n:
        raise Unsupported("a vector of another length")
    if space == "param" and load:
        offset += {name: at for name, at, _ in d.parameters}[base]
        return d.emit("ldp", registers, n=n, aux=w // 8, aux2=flags, imm=offset)
    if set(words) - _KNOWN - {kind} or space not in ("global", "shared", "shared::cta"):
        raise Unsupported(op)
    everywhere = space == "global"
    flags |= NON_COHERENT * ("nc" in words)
    name = ("ld" if load else "st") + ("g" if everywhere else "s")
    at = d.operand(base, 64 if everywhere else 32)
    return d.emit(name, [*registers, at], n=n, aux=w // 8, aux2=flags, imm=offset)


def _cp(d, op, a):
    if op in ("cp.async.cg.shared.global", "cp.async.ca.shared.global"):
        (to, o_to), (of, o_of) = address(a[0]), address(a[1])
        operands = [d.operand(to, 32), d.operand(of, 64)]
        operands += [d.operand(a[3], 32)] if len(a) > 3 else []
        d.emit("cpasync", operands, n=len(operands), aux=int(a[2], 0), aux2=o_to, imm=o_of)
    elif op == "cp.async.commit_group":
        d.emit("cpcommit", [])
    elif op == "cp.async.wait_group":
        d.emit("cpwait", [], imm=int(a[0], 0))
    elif op == "cp.async.wait_all":
        d.emit("cpwaitall", [])
    else:
        raise Unsupported(op)


def _matrix(d, op, a):
    """ldmatrix and stmatrix."""
    words = op.split(".")
    if "b16" not in words or "m8n8" not in words:
        raise Unsupported(op)
    n = next(int(x[1]) for x in words if re.fullmatch(r"x\d", x))
    value, place = (a[0], a[1]) if words[0] == "ldmatrix" else (a[1], a[0])
    base, offset = address(place)
    operands = [*d.vector(value, 32), d.operand(base, 32)]
    d.emit(words[0], operands, aux=n, aux2=int("trans" in words), imm=offset)


def _mma(d, op, a):
    form = re.fullmatch(r"mma\.sync\.aligned\.(m16n8k\d+)\.row\.col\.f32\.(\w+)\.\2\.f32", op)
    forms = ("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")
    if not form or form.groups() not in forms:
        raise Unsupported(op)
    operands = [x for vector in a for x in d.vector(vector, 32)]
    if len(operands) != 14:
        raise Unsupported("fragments of other sizes")
    d.emit("mma8tf" if form[2] == "tf32" else "mma16", operands, aux=int(form[2] == "f16"))


def _wgmma(d, op, a):
    if op.startswith("wgmma.fence"):
        return d.emit("wgfence", [])
    if op.startswith("wgmma.commit"):
        return d.emit("wgcommit", [])
    if op.startswith("wgmma.wait"):
        return d.emit("wgwait", [], imm=int(a[0], 0))
    form = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2"
    if not (m := re.fullmatch(form, op)):
        raise Unsupported(op)
    columns, result, registers = int(m[1]), d.vector(a[0], 32), a[1].startswith("{")
    left = d.vector(a[1], 32) if registers else [d.operand(a[1], 64)]
    scale = d.operand(a[3], 1) if a[3].startswith("%") else -1
    signs, transposed = a[4:6], [int(x) for x in a[6:]]
    if signs != ["1", "1"] or len(result) != columns // 2:
        raise Unsupported("a negated product, or an accumulator of another size")
    t_left, t_right = (0, transposed[0]) if registers else transposed
    flags = columns | registers << 16 | (m[2] == "f16") << 17 | t_left << 18 | t_right << 19
    operands = [*result, *left, d.operand(a[2], 64), scale]
    return d.emit("wgmma", operands, aux=flags, aux2=0 if scale >= 0 else int(a[3]))


_FAMILIES = {
    "mov": _mov,
    **dict.fromkeys((*HALF, "fma"), _arithmetic),
    "lop3": _lop3,
    "setp": _setp,
    "cvt": _cvt,
    "shfl": _shfl,
    "vote": _vote,
    **dict.fromkeys(("ld", "st"), _access),
    "cp": _cp,
    **dict.fromkeys(("ldmatrix", "stmatrix"), _matrix),
    "mma": _mma,
    "wgmma": _wgmma,
}
