"""The neural memory in PyTorch: any depth, any size, any device.

`layout` cuts sequences into blocks, `block` holds the three steps of a block and their derivatives,
`scan` walks the blocks forward and back, `recall` reads without learning; `operator` is what the
ops call.
"""
