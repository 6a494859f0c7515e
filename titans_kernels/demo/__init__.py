"""A small byte-level language model whose memory is trained while it reads: see `__main__`."""
