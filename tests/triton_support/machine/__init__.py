"""Executes the PTX that Triton compiles, on a CPU, and more strictly than a GPU does.

Triton's interpreter never sees what the compiler makes: layouts, shared memory, barriers,
asynchronous copies, fragments of tensor cores. Here they run: `decode` reads PTX text, `core/`
(C++, built once by g++) executes a program of a grid after the other, a warp an instruction,
`program` lays out memory, `launches` sends Triton's own launches there. `samples` and `proof` prove
the emulator on kernels of a few lines and on faults planted in their PTX; `cases` runs the
package's launches against the reference; `python -m triton_support.machine` writes the table of
docs/machine.md.

Found in every launch: accesses out of bounds or misaligned, reads of uninitialised memory,
bytes that two warps touch without a barrier between (one of them writing something else), bytes
that two programs of a grid touch, asynchronous copies and products that are still in flight where
their bytes are used, ld.global.nc of what the launch writes, operands of wgmma without a proxy
fence, barriers that not every warp reaches. Warps run in a seeded random order between barriers;
asynchronous operands land at once in one mode, as late as a wait allows in the other.

Not seen: races between lanes of one warp, ptxas and what it makes of PTX, timing.
"""
