"""A small byte-level language model whose memory learns while it reads: see `__main__`."""
