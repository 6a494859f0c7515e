"""The neural memory in fused Triton kernels, one file a pass.

`coefficients`, `scan` and `retrieve` are one forward pass, each with its backward pass in a file of its own;
`inputs_backward` is what is left of both, `recall` reads without learning. `operator` walks groups
of blocks with them.
"""
