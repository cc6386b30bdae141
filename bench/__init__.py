"""Benchmarks: every number is gated by a comparison with the fp64 reference before it is taken.

    python -m bench --list
    python -m bench --quick
    python -m bench.report

An op is benchmarked by the module of `bench.cases` that has its name, see `bench.measure.harness`.
"""
