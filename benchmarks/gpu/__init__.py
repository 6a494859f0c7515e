"""Everything to be done on a GPU that is there for minutes: `python -m benchmarks.gpu --out DIR`

Works through stages in steps, and writes every result down as soon as it is there:

    tests       the tests that need a GPU, the kernels' tests, every shipped tile on poisoned memory
    verify      every operator, dtype and backend against the float64 reference
    bench       the machine's own ceilings; ours beside the peers that import
    tune        tiles, from the one that ships downhill
    ncu         Nsight Compute on every kernel, where the tool is there
    sanitizer   memory errors and races in small cases, where compute-sanitizer is there

It stops before `--minutes` are over, and resumes where it stopped when it is started again with the
same `--out`, or with `--earlier FILE` on a machine that has not seen it. What takes its process
along, an illegal access or a call that never returns, costs its own step only. It needs no network:
peers may be brought as wheels (`--wheels DIR`). At home,

    python -m benchmarks.gpu.collect DIR

makes benchmarks/results/<device>-<date>.{json,md,png} of it and updates docs/benchmarks.md;
`--tiles` puts the tiles that were found into the table that ships. `--rehearse` goes through all of
it on a CPU, tiny and interpreted, which shows that it works and says nothing about a GPU.
"""
