"""The emulator on kernels with known outputs and on planted faults; run in a process that compiles.

`python -m triton_support.machine.proof --arch sm_80` prints a line a check and fails with one.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter

import torch
import triton

from . import samples
from .faults import ADDRESS, BARRIER, FRAGMENT, WAIT, everywhere, faults
from .launches import executing
from .program import Fault, unwritten

# M, N, K; tile; warps, stages. The first has edges in all three, the second spans programs.
PRODUCTS = (
    ((100, 72, 200), (64, 64, 64), 4, 3),
    ((128, 128, 192), (128, 64, 64), 8, 2),
    ((64, 32, 96), (32, 32, 32), 2, 4),
)


def product(shape, tile, warps, stages, dtype, left=False, right=False, precision="ieee"):
    """One product of random matrices; the result, the operands in float64, what was found."""
    (M, N, K), (BM, BN, _) = shape, tile
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(M, K, generator=draw).to(dtype)
    b = torch.randn(K, N, generator=draw).to(dtype)
    c = torch.full((M, N), float("nan"))
    samples.product[(triton.cdiv(M, BM), triton.cdiv(N, BN))](
        a.t().contiguous() if left else a,
        b.t().contiguous() if right else b,
        c,
        *shape,
        *tile,
        left,
        right,
        precision,
        num_warps=warps,
        num_stages=stages,
    )
    return c, a, b


def accumulated(a: torch.Tensor, b: torch.Tensor, depth: int = 16) -> torch.Tensor:
    """a b as tensor cores' fragments make it: exact over 16, one float32 rounding, in order."""
    c = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], depth):
        c = (c.double() + a[:, k : k + depth].double() @ b[k : k + depth].double()).float()
    return c


def _close(name: str, got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    error = ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()
    if not error <= limit:
        raise AssertionError(f"{name}: error {error:.1e}, at most {limit:.0e}")


def outputs(arch: str, late: bool) -> int:
    """Every sample has its known output and no fault. How many were run."""
    with executing(arch, late=late, poison=True) as found:
        for dtype, (left, right), row in itertools.product(
            (torch.bfloat16, torch.float16),
            ((False, False), (True, False), (False, True), (True, True)),
            PRODUCTS,
        ):
            c, a, b = product(*row, dtype, left, right)
            # The order of 16s is one where the tile is a multiple of 16 and masked by zeros.
            same = arch == "sm_80"
            want = accumulated(a, b) if same else a.double() @ b.double()
            _close(f"product {dtype} {row}", c, want, 0 if same else 1e-6)
        c, a, b = product(*PRODUCTS[2], torch.float32)
        _close("product float32", c, a.double() @ b.double(), 1e-6)
        if arch == "sm_80":
            c, a, b = product(*PRODUCTS[2], torch.float32, precision="tf32")
            _close("product tf32", c, a.double() @ b.double(), 2e-3)
        x = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
        y = torch.empty_like(x)
        samples.softmax[(7,)](x, y, 300, 512)
        _close("softmax", y, torch.softmax(x.double(), 1), 1e-6)
        for dtype, warps in ((torch.float32, 4), (torch.bfloat16, 8)):
            x = torch.randn(100, 72).to(dtype)
            y = torch.empty(72, 100, dtype=dtype)
            samples.transpose[(2, 2)](x, y, 100, 72, 64, num_warps=warps)
            _close("transpose", y, x.t(), 0)
        x, y, s = torch.randn(64, 64), torch.empty(64, 64), torch.empty(64)
        samples.scan[(1,)](x, y, s, 64)
        _close("scan", y, x.double().cumsum(0), 1e-6)
        _close("sums of squares", s, x.double().square().sum(1), 1e-6)
        samples.reverse[(1,)](torch.empty(512), y := torch.empty(512), 512, True)
        _close("reverse", y, 511 - torch.arange(512), 0)
        samples.nested[(1,)]((x[0], 3, (x[1], None, 1)), y := torch.empty(64), 64)
        _close("nested", y, 3 * x[0] + x[1] + 1, 1e-6)
    for launch in found:
        if launch.faults:
            raise AssertionError(f"{launch.kernel}: {launch.faults}\n{launch.notes}")
    return len(found)


def strictness(arch: str) -> int:
    """Faults of the kernels themselves are found. How many."""
    with executing(arch) as found:
        samples.reverse[(1,)](torch.empty(512), torch.empty(512), 512, False)
        samples.overlap[(3,)](torch.empty(400), 128)
        for dtype in (torch.float32, torch.bfloat16):
            x, y = torch.zeros(128, dtype=dtype), torch.zeros(128, dtype=dtype)
            samples.copy[(1,)](x, y, 128)
            unwritten(x[64:])
            samples.copy[(1,)](x, y, 128)
    for launch, read in zip(found[2:], (False, True, False, True), strict=True):
        if bool(launch.counts["uninitialised_global"]) != read:
            raise AssertionError(f"uninitialised global memory: {launch.counts}")
    if not found[0].counts["races_global"] or not found[1].counts["races_grid"]:
        raise AssertionError("a race in global memory was not found")
    with executing(arch):
        try:
            samples.copy[(1,)](torch.zeros(100), torch.zeros(128), 128)
        except Fault as fault:
            assert "out of bounds" in str(fault), fault
        else:
            raise AssertionError("a load out of bounds was not found")
    return 5


def small() -> torch.Tensor:
    """Softmax, transpose, scan and the reversal: everything they return, in one tensor."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    y = [torch.zeros(64, 64) for _ in range(3)] + [torch.zeros(64), torch.zeros(512)]
    samples.softmax[(64,)](x, y[0], 64, 64)
    samples.transpose[(1, 1)](x, y[1], 64, 64, 64)
    samples.scan[(1,)](x, y[2], y[3], 64)
    samples.reverse[(1,)](torch.empty(512), y[4], 512, True)
    return torch.cat([t.flatten() for t in y])


def pipelined() -> torch.Tensor:
    """A product whose loads are two steps ahead."""
    return product((64, 64, 256), (64, 64, 64), 4, 3, torch.bfloat16)[0]


def planted(arch: str, limit: int = 8) -> Counter:
    """Each fault planted in the samples' PTX is found. How many of each kind were.

    Found: by the checks, or by a result that differs. A kernel has waits and barriers that repeat
    what others see to, so in the pipelined product all of them are changed together.
    """
    tried, missed = Counter(), []
    for launch, kinds in ((small, (BARRIER, ADDRESS)), (pipelined, (WAIT, FRAGMENT, ADDRESS))):
        texts: dict[str, str] = {}
        with executing(arch, edit=lambda name, ptx, texts=texts: texts.setdefault(name, ptx)):
            want = launch()
        plans = [
            (kind, name, line, text)
            for name, ptx in texts.items()
            for kind, line, text in faults(ptx)
            if kind in kinds and kind != WAIT
        ]
        if launch is pipelined:
            ptx = texts["product"]
            plans += [(kind, "product", 0, everywhere(kind, ptx)) for kind in (WAIT, BARRIER)]
        for kind, name, line, text in plans:
            if tried[kind, name] == limit:
                continue
            tried[kind, name] += 1
            edit = lambda n, ptx, name=name, text=text: text if n == name else ptx  # noqa: E731
            try:
                with executing(arch, edit=edit) as found:
                    got = launch()
                seen = any(x.faults for x in found) or not torch.equal(got, want)
            except Fault:
                seen = True
            if not seen:
                missed.append(f"{kind}, {name} line {line}: {texts[name].splitlines()[line - 1]}")
    if missed:
        raise AssertionError("planted and not found:\n" + "\n".join(missed))
    return Counter({kind: sum(n for (k, _), n in tried.items() if k == kind) for kind, _ in tried})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m triton_support.machine.proof")
    parser.add_argument("--arch", default="sm_80", choices=("sm_80", "sm_90"))
    arch = parser.parse_args().arch
    for late in (True, False):
        print(f"{arch}: {outputs(arch, late)} launches, asynchronous operands late: {late}")
    print(f"{arch}: {strictness(arch)} faults of kernels found")
    print(f"{arch}: planted and found: {dict(planted(arch))}")


if __name__ == "__main__":
    main()
