"""Triton kernels. Files in this folder import triton and nothing else of ours; launching is backends/triton.py's work."""
