"""`svitt tune`: tiles for this GPU, by the benchmark of the checkout."""

from svitt_ops.training.cli.bench import run

__all__ = ["run"]
