"""Running a case: what is compared, at which sizes, by whom, and how it is measured.

cases.py is the registry, shapes.py the sizes with their FLOP and bytes; providers.py builds ours,
the reference and titans-pytorch, peers.py other sequence models. harness.py checks and times,
memory.py measures peak memory, breakdown.py profiles. checking.py compares kernels with the
PyTorch backend, machine.py describes the machine, journal.py keeps the results of a long run as
they arrive.
"""
