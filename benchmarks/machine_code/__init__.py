"""What the kernels compile to, without a GPU.

offline.py compiles a launch for a GPU that is not there, sass.py reads the machine code, static.py
holds all shipped kernels to their limits, model.py predicts times from the counts. tune.py searches
tiles on a GPU.
"""
