"""The `svitt` command, for `torchrun -m svitt_ops.training pretrain ...`."""

import sys

import torch.distributed as dist

from svitt_ops.training.cli import main

if __name__ == "__main__":
    status = main()
    # Threads of a group that still stands when the process ends can abort it.
    if status == 0 and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)
