"""`make guides`: every documented command, as a reader gives it, on what a reader brings.

    python tests/guides BIN FOLDER      # where `svitt` is installed, and an empty folder to work in

Commands are taken from the README, `docs/`, the recipes' guide and `--help`, word for word; what
`PLAN` adds to one makes it shorter, not different. A command that is documented and not in `PLAN`,
or planned and not documented, is an error.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from corpus import FILMS, write_corpus
from documented import documented_commands
from weights import TINY, write_weights

SHORT = "optimizer.steps=6 optimizer.warmup_steps=2 run.save_steps=3"


@dataclass(frozen=True)
class Step:
    """One documented command."""

    command: str
    more: str = ""
    """Arguments behind it that make it shorter."""
    leaves: str = ""
    """The file that it must leave behind."""
    killed_at: str = ""
    """Killed once this exists, and then given again."""


OWN = "data.annotations=my.json data.root=videos"
SMALL = f"svitt pretrain --config small {OWN}"
PICTURES = (
    "svitt pretrain --config small data.annotations=pictures.json data.root=pictures"
    " data.kind=image output=runs/pictures"
)
FOUND = "svitt evaluate retrieval runs/small --annotations my.json --root videos"
SEEN = 'svitt visualize runs/small videos/clip.mp4 --caption "a dog jumps" --output survivors.png'
EMBEDDED = "svitt embed runs/small --videos videos --output videos.safetensors"
SEARCHED = "svitt search videos.safetensors"
MAPS = "svitt visualize runs/demo/match"
RANKS = "torchrun --nproc-per-node 8 -m svitt_ops.training pretrain --config my-recipe.yaml"
TUNED = "svitt finetune --config retrieval-msrvtt init.checkpoint=runs/small"
ASKED = "svitt finetune --config qa-msrvtt init.checkpoint=runs/small"
ANSWERED = "svitt evaluate qa runs/qa-msrvtt --annotations questions.json --root videos"
CHOSEN = "svitt evaluate multiple-choice runs/retrieval-msrvtt --annotations choices.json"
HELD_OUT = "data.validation.0.annotations=my.json data.validation.0.root=videos"
BEIT = "beit-base-patch16-224-pt22k-ft22k"
STAGES = {n: f"svitt pretrain --config pretrain-{n}f" for n in (4, 8)}
PLAN = (
    Step("svitt info"),
    Step("svitt sparsity --frames 4 8 16"),
    Step(
        "svitt demo", "optimizer.steps=2 optimizer.batch_size=8", leaves="runs/demo/survivors.png"
    ),
    Step(
        SMALL,
        SHORT,
        leaves="runs/small/final/model.safetensors",
        killed_at="runs/small/checkpoint-3",
    ),
    Step("svitt pretrain --config small --show > my-recipe.yaml", leaves="my-recipe.yaml"),
    Step(RANKS, f"{OWN} {SHORT} output=runs/ranks", leaves="runs/ranks/final/config.json"),
    Step(PICTURES, SHORT, leaves="runs/pictures/final/model.safetensors"),
    Step(f"{FOUND} --probe", "--json probe.json", leaves="probe.json"),
    Step(FOUND, "--json found.json", leaves="found.json"),
    Step(SEEN, leaves="survivors.png"),
    Step(EMBEDDED, leaves="videos.safetensors"),
    Step(f'{SEARCHED} "a dog jumps" --model runs/small', "--json dogs.json", leaves="dogs.json"),
    Step(
        f"{SEARCHED} videos/clip.mp4 --model runs/small --top 3",
        "--json like.json",
        leaves="like.json",
    ),
    Step(
        "svitt embed runs/small --images pictures.json --root pictures"
        " --output pictures.safetensors",
        leaves="pictures.safetensors",
    ),
    Step(
        'svitt embed runs/small --texts "a dog jumps" "a red square" --output texts.safetensors',
        leaves="texts.safetensors",
    ),
    Step(
        f"{TUNED} {OWN}",
        f"{SHORT} optimizer.batch_size=8 evaluation.clips=1 {HELD_OUT}",
        leaves="runs/retrieval-msrvtt/best/config.json",
    ),
    Step(
        "svitt finetune --config qa-msrvtt --show > my-questions.yaml", leaves="my-questions.yaml"
    ),
    Step(
        f"{ASKED} data.annotations=questions.json data.root=videos data.answers=answers.json",
        f"{SHORT} optimizer.batch_size=8",
        leaves="runs/qa-msrvtt/final/config.json",
    ),
    Step(ANSWERED, "--json answered.json", leaves="answered.json"),
    Step(f"{CHOSEN} --root videos", "--json chosen.json", leaves="chosen.json"),
    Step(
        "svitt evaluate text-similarity runs/small --annotations similar.csv",
        "--json similar.json",
        leaves="similar.json",
    ),
    Step(
        f"{FOUND.replace('small', 'retrieval-msrvtt')} --protocol msrvtt-1ka --json found-1ka.json",
        leaves="found-1ka.json",
    ),
    Step(
        "svitt demo --system albef",
        "optimizer.steps=2 optimizer.batch_size=8",
        leaves="runs/demo/match/final/model.safetensors",
    ),
    Step(
        f'{MAPS} pictures/photo.jpg --caption "a red square" --output maps',
        leaves="maps/000-photo.png",
    ),
    Step(
        f"{MAPS} --annotations pictures.json --root pictures --output maps",
        leaves="maps/001-DSC_0001.png",
    ),
    Step(STAGES[4], "--show"),
    Step(
        f"{STAGES[4]} {OWN}",
        f"{SHORT} optimizer.batch_size=8 {TINY}",
        leaves="runs/svitt-4f/final/config.json",
    ),
    Step(
        f"{STAGES[8]} {OWN}",
        f"{SHORT} optimizer.batch_size=8",
        leaves="runs/svitt-8f/final/config.json",
    ),
)
ELSEWHERE = {
    f"{SEARCHED} --serve --model runs/small": "ends when it is interrupted: test_page.py",
    "svitt bench": "needs the checkout: test_main.py",
    "svitt bench --quick": "the same",
    "svitt bench --predict h100": "needs the checkout: test_predict.py",
    "svitt bench --predict h100 --kernels COMMIT": "the same",
    "svitt bench --predict h200 --compare RESULT.json": "the same",
    "python -m bench.predict.rank": "the same",
    "CFLAGS=-DSVITT_STAND_IN make setup": "another extension",
    "SVITT_CPU_CAPABILITY=avx512_bf16 .venv/bin/python -m bench.predict.stand_in": "of that one:"
    " test_stand_in.py",
    ".venv/bin/python -m svitt_ops.kernels.compile_check --quick --arch 90"
    " --keep kernels/machine_code.json": "make compile-check compares with what it keeps",
    "svitt tune --dry-run": "needs the checkout: test_tune.py",
    "svitt tune --minutes 20": "the same",
    "make demo": "`svitt demo` in the checkout",
    "make setup": "what every other target begins with",
    "make test": "of the checkout, as .ci/run does",
    "make lint": "of the checkout, as .ci/run does",
    ".ci/run": "runs this",
    "pip install --no-build-isolation .": "`make guides` installs the wheel",
    "pip install --no-build-isolation -e '.[train]'": "`make setup` does, with more extras",
    'grep -rnE -A3 "[Tt]ried,? without gain|did not help" csrc kernels': "test_pages.py",
    f"hf download microsoft/{BEIT} --local-dir {BEIT}": "needs a network",
    "hf download google-bert/bert-base-uncased --local-dir bert-base-uncased": "needs a network",
    "svitt pretrain --config small ...": "an abbreviation",
    "svitt evaluate retrieval runs/small ...": "an abbreviation",
    "svitt finetune --config qa-msrvtt ...": "an abbreviation",
}


def faults(svitt: Path) -> list[str]:
    """What is documented and not known here, and what is known and not documented any more."""
    documented, known = documented_commands(svitt), {step.command for step in PLAN} | set(ELSEWHERE)
    new = sorted(set(documented) - known)
    return [
        *(f"documented in {documented[x]}, but not run here: {x}" for x in new),
        *(f"not documented: {x}" for x in sorted(known - set(documented))),
    ]


def main(programs: Path, folder: Path) -> None:
    if wrong := faults(programs / "svitt"):
        sys.exit("\n".join(wrong))
    write_corpus(folder)
    write_weights(folder)
    environment = dict(os.environ, PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    environment |= {"HF_HUB_OFFLINE": "1"}
    for step in PLAN:
        line = f"{step.command} {step.more}".replace("per-node 8", "per-node 2")
        began = time.monotonic()
        if step.killed_at:
            _kill(line, folder, environment, folder / step.killed_at)
        _run(line, folder, environment)
        if step.leaves and not (folder / step.leaves).is_file():
            sys.exit(f"{step.command}: did not leave {step.leaves}")
        print(f"{time.monotonic() - began:5.0f} s  {step.command}", flush=True)
    found = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert found["videos"] == FILMS and len(found["skipped"]) == 2, found
    print(f"{len(PLAN)} documented commands ran; not here:")
    for command, reason in ELSEWHERE.items():
        print(f"  {command}: {reason}")


def _run(line: str, folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode or "Traceback" in done.stdout:
        sys.exit(f"{done.stdout}\nexit {done.returncode}: {line}")


def _kill(line: str, folder: Path, environment: dict[str, str], seen: Path) -> None:
    """Start a command, and kill it with all of its processes once a file is there."""
    log = folder / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        while not seen.exists():
            if process.poll() is not None:
                sys.exit(f"{log.read_text()}\nended before {seen}: {line}")
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
