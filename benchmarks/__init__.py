"""Microbenchmarks against what a user would pick instead: `python -m benchmarks`

cases.py says what is compared, and only that; shapes.py has sizes and what they cost, providers.py
builds ours, the definition and the peers. harness.py checks and times them, memory.py measures
their peak memory, breakdown.py where our time goes. report.py and plots.py write down what came
out, beside the machine it came out of (machine.py).

A new case is a record in cases.py; a new peer is a builder in providers.py and its name in a case.
"""
