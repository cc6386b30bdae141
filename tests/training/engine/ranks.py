"""Two processes that live as long as the tests: starting them takes longer than what they train.

    python -m torch.distributed.run --nproc-per-node 2 ranks.py FOLDER PID

runs the commands that tests write into the folder, one after another, as long as a process lives.
"""

import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

PAUSE = 0.02  # seconds


class Command:
    """What two processes do, with the end of `subprocess.Popen`."""

    def __init__(self, process: subprocess.Popen[bytes], ends: list[Path]) -> None:
        self.process, self.ends = process, ends

    def wait(self, timeout: float) -> int:
        """0, or how the processes ended; they end both when one fails."""
        until = time.monotonic() + timeout
        while not all(end.exists() for end in self.ends):
            if self.process.poll() is not None:
                return self.process.returncode or 1
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("ranks.py", timeout)
            time.sleep(PAUSE)
        return 0


def send(process: subprocess.Popen[bytes], folder: Path, *words: str) -> Command:
    """Have `svitt` with these words run by both processes."""
    number = len(list(folder.glob("*.json")))
    (folder / "new").write_text(json.dumps(words))
    (folder / "new").rename(folder / f"{number}.json")
    return Command(process, [folder / f"{number}-{rank}" for rank in (0, 1)])


def _serve(folder: Path, parent: int) -> None:
    from svitt_ops.training.cli import main

    for number in itertools.count():
        while not (given := folder / f"{number}.json").exists():
            try:
                os.kill(parent, 0)
            except ProcessLookupError:  # the tests were killed
                return
            time.sleep(PAUSE)
        code = 1
        try:
            code = main(json.loads(given.read_text()))
        except BaseException:
            traceback.print_exc()
        if code:
            os._exit(code)  # torchrun ends the other one
        (folder / f"{number}-{os.environ['RANK']}").touch()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
