"""What the operators cost, beside what a user would pick instead.

On a CPU, `python -m benchmarks`: cases.py says what is compared, and only that; shapes.py has sizes
and what they cost, providers.py builds ours, the definition and the peers. harness.py checks and
times them, memory.py measures their peak memory, breakdown.py where our time goes. report.py and
plots.py write down what came out, beside the machine it came out of (machine.py).

On a GPU that is there for minutes, `python -m benchmarks.gpu`: tests, timings, tuning and profiles
in steps that go on where they stopped, and `python -m benchmarks.gpu.collect` for what came back.
`python -m benchmarks.tune` alone looks for better tiles (checking.py: the right ones), journal.py
keeps what was found.

Without a GPU, `python -m benchmarks.static` says what the kernels cost in machine code (offline.py
compiles it, machine_code.py reads it), `python -m benchmarks.model` what they would take on paper.

A new case is a record in cases.py; a new peer is a builder in providers.py and its name in a case.
"""
