"""What the kernels compile to, without a GPU.

offline.py compiles a launch for a GPU that is not there, sass.py reads the machine code, loops.py
and executed.py say how often it is executed, static.py holds all shipped kernels to their limits.
model.py predicts times from the counts, with the rates of hardware.py, next to what others have
published (published.py). tune.py searches tiles on a GPU.
"""
