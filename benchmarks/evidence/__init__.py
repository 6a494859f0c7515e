"""Does the memory remember? Small models, trained here, asked for what they read long ago.

`python -m benchmarks.evidence`: tasks.py makes the texts, models.py the models, which differ in
nothing but what mixes their tokens, training.py trains and asks them, report.py writes down what
came out: benchmarks/results/evidence-<date>.{json,md,png}.
"""
