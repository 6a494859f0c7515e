"""Does the memory remember? Small models, trained on recall tasks and evaluated by length.

`python -m benchmarks.evidence`: tasks.py makes the texts, models.py the models, which differ in
nothing but what mixes their tokens, training.py trains and evaluates them, report.py writes
benchmarks/results/evidence-<date>.{json,md,png}.
"""
