"""The pages: every block of Python and YAML runs, every command is known, nothing is left out."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("av")
from documented import PAGES, REPOSITORY, blocks
from tiny_svitt import SVITT
from transformers import Dinov2Config, Dinov2Model

import svitt_cli
import svitt_ops
from svitt_ops import models, training
from svitt_ops.models import SViTTConfig, SViTTForPreTraining
from svitt_ops.models.systems import system_names
from svitt_ops.training.corpora.shapes import CorpusSpec, plan, write_video
from svitt_ops.training.data.processor import VideoTextProcessor
from svitt_ops.training.data.text import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PYTHON = [page for page in PAGES if blocks(page, "python")]
NEEDS = ("sentence_transformers",)
"""Packages beside those of the extra `train`; pages that import one are skipped without it."""


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader has in the working folder: a run, a video, and a model that was downloaded."""
    torch.manual_seed(0)
    final = tmp_path / "runs" / "small" / "final"
    SViTTForPreTraining(SViTTConfig(**SVITT)).save_pretrained(final)
    tokenizer = train_tokenizer(["a dog jumps", "a red square"], 60)
    VideoTextProcessor(tokenizer, size=16, num_frames=2).save_pretrained(final)
    spec = CorpusSpec(size=16, frames=4, train_films=1)
    (pictures, *_) = plan(spec)[0].shoot(spec).values()
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "clip.mp4", pictures)
    (tmp_path / "my.json").write_text('[{"video": "clip.mp4", "caption": "a dog jumps"}]')
    # As deep as the real one, and in a folder of its name: nothing is fetched.
    small = Dinov2Config(hidden_size=16, num_attention_heads=2, mlp_ratio=2)
    Dinov2Model(small).save_pretrained(tmp_path / "facebook" / "dinov2-base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs(page: str, reader: Path) -> None:
    for package in NEEDS:
        if _imports(page, package):
            pytest.importorskip(package)
    names: dict[str, Any] = {"__name__": page}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * (line - 1) + block, str(REPOSITORY / page), "exec"), names)


def _imports(page: str, package: str) -> bool:
    text = "".join(block for _, block in blocks(page, "python"))
    return re.search(rf"^(from|import) {package}\b", text, re.M) is not None


def test_no_package_is_named_in_vain() -> None:
    assert all(any(_imports(page, package) for page in PYTHON) for package in NEEDS)


def test_recipes_are_recipes(tmp_path: Path) -> None:
    found = [block for page in PAGES for _, block in blocks(page, "yaml")]
    assert found
    for block in found:
        path = tmp_path / "recipe.yaml"
        path.write_text(block)
        assert training.load_recipe(path, []).data.train


def test_no_block_is_of_another_kind() -> None:
    known = ("", "python", "yaml", "{toctree}")
    for page in PAGES:
        fences = (REPOSITORY / page).read_text().count("\n```")
        assert fences == 2 * len(blocks(page, *known)), page


def test_commands_are_known() -> None:
    guides = runpy.run_path(str(REPOSITORY / "tests" / "guides" / "__main__.py"), run_name="guides")
    assert guides["faults"](Path(sys.executable).with_name("svitt")) == []
    search = next(x for x in guides["ELSEWHERE"] if x.startswith("grep "))
    done = subprocess.run(["bash", "-c", search], cwd=REPOSITORY, capture_output=True, text=True)
    assert "ried without gain" in done.stdout


def test_commands_in_sentences_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    commands = next(x.choices for x in svitt_cli._parser()._actions if x.dest == "command")
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(), flags=re.S | re.M)
        for span in re.findall(r"`([^`]+)`", text):
            program, *words = span.split() or [""]
            if program == "make" and words:
                assert re.search(rf"^{words[0]}:", makefile, re.M), f"{page}: {span}"
            elif program == "svitt" and words and words[0].isalpha():
                assert words[0] in commands, f"{page}: {span}"
                if words[0] not in ("bench", "tune"):  # whose parsers are in the checkout
                    options = {x for x in words if x.startswith("--")}
                    unknown = options - commands[words[0]]._option_string_actions.keys()
                    assert not unknown, f"{page}: {span}"
            elif span.startswith("python -m bench"):
                module = REPOSITORY / words[1].replace(".", "/")
                assert module.is_dir() or module.with_suffix(".py").is_file(), f"{page}: {span}"


def test_the_api_is_whole() -> None:
    apart = {"OPS", "__version__", "convert", "nn", "reference"}  # modules have a part of their own
    for page, module in (("ops", svitt_ops), ("models", models), ("training", training)):
        text = (REPOSITORY / "docs" / "api" / f"{page}.rst").read_text()
        listed = re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.M)
        assert sorted(listed) == sorted(set(module.__all__) - apart)


def test_the_citation_names_every_system() -> None:
    said = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert said["cff-version"] == "1.2.0" and said["message"] and said["title"] and said["authors"]
    papers = said["references"]
    assert all(x["type"] and x["title"] and x["authors"] and x["year"] for x in papers)
    assert sorted(x["notes"] for x in papers) == sorted(system_names())


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/x.js">',
        "<link rel='stylesheet' href='//fonts.example/css'>",
        '<img alt="a" src="http://example/a.png">',
        "a { background: url(https://example/b.png) }",
        '@import "https://example/c.css";',
    ],
)
def test_what_a_site_loads_from_elsewhere_is_seen(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check = runpy.run_path(str(REPOSITORY / "docs" / "check.py"))
    for page in check["PAGES"]:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text('<a href="https://example.org">a link</a><img src="a.png">')
        (tmp_path / page).with_name("a.png").touch()
    assert check["main"](tmp_path) == 0
    (tmp_path / "docs" / "train.html").write_text(text)
    assert check["main"](tmp_path) == 1
    assert "docs/train.html: loads " in capsys.readouterr().out
    (tmp_path / "docs" / "train.html").write_text('<img src="gone.png">')
    assert check["main"](tmp_path) == 1
