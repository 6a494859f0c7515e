"""Training a Titans language model, as a program to copy from: `python -m titans_kernels.train`."""
