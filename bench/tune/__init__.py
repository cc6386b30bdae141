"""Finds tiles of the Triton kernels that are faster on this GPU, and writes them into a table.

A first phase runs every candidate once in many processes, since compiling takes most of the time:
what they compile is in Triton's cache afterwards. Then one process checks and times them, alone on
the GPU, most valuable first, and of one pass in the order that `bench.predict` ranks them: against
the op's oracle, within its budget, twice with the same bits, in turns with today's tile, by CUDA
graphs and a cold L2 as the benchmark does. A candidate that crashes or hangs costs its process, and
the next one goes on with the rest. What is known is written after each result.
"""
