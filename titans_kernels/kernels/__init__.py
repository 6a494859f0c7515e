"""The neural memory in fused Triton kernels, one file a pass.

`coefficients`, `scan` and `retrieve` are the forward pass, each with its backward pass in a file of
its own; `inputs_backward` is the rest of the last two's, `recall` reads without an update.
`operator` runs them on groups of blocks.
"""
