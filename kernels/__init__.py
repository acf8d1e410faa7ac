"""Triton kernels. `fdda_fast.ops` registers them for CUDA devices."""
