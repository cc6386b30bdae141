"""Triton kernels for NVIDIA GPUs, one file per op; they import torch and triton alone.

Every file holds `@triton.jit` kernels and the launchers that allocate results and start them. A
launcher has the signature of its op in the schema. `tiles` holds the tile shapes, `compile_check`
compiles every kernel in every tile configuration on a machine without a GPU.
"""
