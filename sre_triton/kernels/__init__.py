"""Triton: the kernels, and how they are launched."""
