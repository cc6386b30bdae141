"""Benchmarks: every number is gated by a comparison with the fp64 reference before it is taken.

    python -m bench --list
    python -m bench --quick
    python -m bench.report
    python -m bench.tune --list

`cases` says what is measured, a file an op; `peers` what it is compared with; `measure` how;
`report` what is made of the `results`. `tune` times candidates for the kernels' tiles.
"""
