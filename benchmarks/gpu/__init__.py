"""Everything to be done on a GPU that is there for minutes: `python -m benchmarks.gpu --out DIR`

Works through stages in steps, what says most first, and writes every result to disk as soon as it
is known:

    first       at most a minute: outputs, gradients and decoding at D 64 on poisoned memory, then
                every kernel's time for a short list of tiles, compiled beforehand on all cores
    bench       the machine's own ceilings; the headline: ours and the peers that import
    tiles       every shipped tile on poisoned memory; the same bits again on a full GPU
    tune        tiles, from the one that ships downhill
    ncu         Nsight Compute on scan and scan_backward, where the tool is there
    verify      every operator, dtype and backend against the float64 reference
    more        the other benchmarks
    tests       the tests that need a GPU and the kernels' tests, each a result of its own
    sanitizer   memory errors and races in small cases, where compute-sanitizer is there

It stops before `--minutes` are over, and resumes where it stopped when it is started again with the
same `--out`, or with `--earlier FILE` on a machine that has not seen it. What takes its process
along, an illegal access or a call that never returns, costs its own step only, and whoever kills it
at whatever moment costs it the step in flight. It needs no network:
peers may be brought as wheels (`--wheels DIR`). At home,

    python -m benchmarks.gpu.collect DIR

makes benchmarks/results/<device>-<date>.{json,md,png} of it and updates docs/benchmarks.md;
`--tiles` puts the tiles that were found into the table that ships. `--rehearse` goes through all of
it on a CPU, tiny and interpreted, which shows that it works and says nothing about a GPU.
"""
