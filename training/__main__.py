"""The `svitt` command, for `torchrun -m svitt_ops.training pretrain ...`."""

import sys

from svitt_ops.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
