"""The neural memory in fused Triton kernels, one file a pass.

`coefficients`, `scan` and `retrieve` are one forward pass; `recall` reads without learning;
`operator` is what the ops call."""
