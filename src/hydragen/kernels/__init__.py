"""Triton kernels. They import triton and nothing else; launching is the work of backends/triton.py."""
