"""Embedding files and searching them, by the functions and by the commands."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from svitt_ops.training.cli import main
from svitt_ops.training.data.annotations import read_annotations
from svitt_ops.training.embeddings import embedding as module
from svitt_ops.training.embeddings import store as stored
from svitt_ops.training.embeddings.embedding import Embedder, embed
from svitt_ops.training.embeddings.listing import list_media, list_texts
from svitt_ops.training.embeddings.store import Embeddings, write
from svitt_ops.training.engine.run import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
IDENTITY = {"model": "M", "weights": "0" * 64, "settings": {"frames": 4}}


@pytest.fixture(scope="module")
def model(make_recipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("search") / "run"
    return pretrain(make_recipe(output, "optimizer.steps=2", eval_pattern_seed=0)).folder


@pytest.fixture(scope="module")
def embedder(model: Path) -> Embedder:
    return Embedder.load(model, cpu=True)


@pytest.fixture
def clips(corpus: Path, tmp_path: Path) -> Path:
    """A folder with the corpus's eight test clips in a folder of it."""
    (tmp_path / "clips" / "more").mkdir(parents=True)
    for entry in json.loads((corpus / "test.json").read_text()):
        shutil.copy(corpus / entry["video"], tmp_path / "clips" / "more")
    return tmp_path / "clips"


def store(path: Path, rows: Tensor, names: list[str] | None = None) -> Embeddings:
    names = [f"clip {k}.mp4" for k in range(len(rows))] if names is None else names
    stamps = torch.zeros(len(rows), 2, dtype=torch.int64)
    write(path, kind="video", names=names, stamps=stamps, embeddings=rows, identity=IDENTITY)
    return Embeddings.load(path)


def test_a_file_comes_back(tmp_path: Path) -> None:
    names = ["a\nb.mp4", "", "ä 猫.mp4", "clip\udce9.mp4"]
    rows = torch.randn(4, 3)
    found = store(tmp_path / "e.safetensors", rows, names)
    assert found.names == names and len(found) == 4 and found.identity == IDENTITY
    assert torch.equal(found.rows(), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 5, 300])
def test_search_is_exact(tmp_path: Path, chunk: int, count: int) -> None:
    rows = F.normalize(torch.randn(200, 8), dim=1)
    rows[50:90] = rows[3]  # of equal ones the first
    queries = torch.cat([F.normalize(torch.randn(3, 8), dim=1), rows[3:4]])
    scores, numbers = store(tmp_path / "e.safetensors", rows).search(queries, count, chunk)
    # Products of other shapes may round otherwise: of equal rows alone the order is asked.
    wanted = (queries @ rows.T).sort(stable=True, dim=1, descending=True)
    torch.testing.assert_close(scores, wanted.values[:, :count])
    torch.testing.assert_close((queries[:, None] * rows[numbers]).sum(2), scores)
    assert numbers[3, : min(count, 41)].tolist() == [3, *range(50, 90)][:count]
    assert all(len(set(row)) == len(row) for row in numbers.tolist())


def test_search_by_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    rows, queries = (F.normalize(torch.randn(n, 8), dim=1) for n in (500, 4))
    found = store(tmp_path / "e.safetensors", rows)
    wanted = found.search(queries, 7)
    monkeypatch.setattr(stored, "LARGE", 1)
    torch.testing.assert_close(found.search(queries, 7, chunk=90), wanted)


@pytest.mark.parametrize(
    ("queries", "line"),
    [
        (torch.ones(8), r"queries must be finite, \(queries, dim\), got \(8,\)"),
        (torch.full((1, 8), torch.nan), "queries must be finite"),
        (torch.ones(1, 7), "queries must have 8 columns as .*e.safetensors has, got 7"),
    ],
)
def test_queries_refused(tmp_path: Path, queries: Tensor, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        store(tmp_path / "e.safetensors", torch.ones(3, 8)).search(queries)


def test_files_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.ones(2)}, tmp_path / "other")
    store(tmp_path / "cut", torch.ones(3, 8))
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-20])
    for name in ("text", "other", "cut", "missing"):
        with pytest.raises(ValueError, match=rf"{name}: must be a file of `svitt embed` \("):
            Embeddings.load(tmp_path / name)


def test_listing(clips: Path, corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    films = sorted((clips / "more").iterdir())
    (clips / "note.txt").write_text("x")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(clips / "a.PNG")
    found = list_media([clips, films[0], clips / "more" / ".." / "more" / films[1].name], "video")
    assert found == [str(clips / "a.PNG"), *map(str, films)]
    assert "passed over what is no picture or video by its name: 1 .txt" in caplog.text
    assert list_media([str(clips / "**" / "*.mp4")], "video") == [*map(str, films)]
    named = list_media([corpus / "test.json"], "video")
    wanted = [x.media[0] for x in read_annotations(corpus / "test.json").entries]
    assert named == [*dict.fromkeys(wanted)]
    for missing in ("nothing.mp4", clips / "*.mov"):
        with pytest.raises(ValueError, match=r"--videos: must (be a file|name a file at least)"):
            list_media([missing], "video")


def test_listing_of_texts(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("A dog.\n\na cat\na dog\n")
    assert list_texts([str(tmp_path / "texts.txt"), "A bird!"]) == ["a dog", "a cat", "a bird"]
    entries = read_annotations(corpus / "test.json").entries
    captions = [caption for entry in entries for caption in entry.captions]
    assert list_texts([str(corpus / "test.json")]) == [*dict.fromkeys(captions)]
    assert list_texts(["a red circle then"], max_words=2) == ["a red"]
    for nothing in ("...", "missing.txt"):
        with pytest.raises(ValueError, match="--texts: must"):
            list_texts([nothing])


def test_the_commands(
    model: Path,
    clips: Path,
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They find what evaluation finds."""
    (clips / "broken.mp4").write_bytes(b"no film")
    output = str(tmp_path / "clips.safetensors")
    words = ["embed", str(model), "--videos", str(clips), "--output", output, "--workers", "0"]
    assert main(words) == 0
    assert f"8 videos in {output}" in capsys.readouterr().out
    assert "1 unusable file skipped" in caplog.text
    assert "broken.mp4" in (tmp_path / "clips-skipped.tsv").read_text()
    found = Embeddings.load(output)
    torch.testing.assert_close(found.rows().norm(dim=1), torch.ones(8))

    entries = json.loads((corpus / "test.json").read_text())
    ranks = []
    for entry in entries:
        asked = ["search", output, entry["caption"], "--model", str(model)]
        assert main([*asked, "--json", str(tmp_path / "found.json"), "--top", "20"]) == 0
        rows = json.loads((tmp_path / "found.json").read_text())["found"]
        scores = [row["score"] for row in rows]
        assert len(rows) == 8 and scores == sorted(scores, reverse=True)
        names = [Path(row["name"]).name for row in rows]
        ranks.append(names.index(Path(entry["video"]).name))
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 8 and lines[0].endswith(names[0]) and lines[0].startswith("1  ")
    number = ["evaluate", "retrieval", str(model), "--annotations", str(corpus / "test.json")]
    number += ["--top-k", "0", "--workers", "0", "--json", str(tmp_path / "numbers.json")]
    assert main(number) == 0
    facts = json.loads((tmp_path / "numbers.json").read_text())
    for k in (1, 5):
        share = 100 * sum(rank < k for rank in ranks) / len(ranks)
        assert share == pytest.approx(facts["text_to_video"][f"R{k}"])

    film = found.names[3]
    assert main(["search", output, film, "--model", str(model), "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"1   1.0000  {film}"


def test_pictures_and_texts(model: Path, embedder: Embedder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise = np.random.default_rng(ord(name)).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{name}.png")
    output = str(tmp_path / "e.safetensors")
    assert main(["embed", str(model), "--images", str(tmp_path), "--output", output]) == 0
    assert [Path(x).name for x in Embeddings.load(output).names] == ["a.png", "b.png"]
    given = ["a red circle", "A red circle!", "a blue square then a red circle"]
    output = str(tmp_path / "t.safetensors")
    assert main(["embed", str(model), "--texts", *given, "--output", output]) == 0
    found = Embeddings.load(output)
    assert found.names == ["a red circle", given[2]]
    torch.testing.assert_close(found.rows(), embedder.texts(found.names))


KILLED = """
import os, signal, sys
from svitt_ops.training.embeddings import embedding
embedding.PAUSE, write, left = 0.0, embedding._write, [2]
def dies(*given):
    write(*given)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
embedding._write = dies
from svitt_ops.training.cli import main
main(sys.argv[1:])
"""


def test_killed_and_gone_on(
    model: Path, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "clips.safetensors"
    words = ["embed", str(model), "--videos", str(clips), "--output", str(output)]
    words += ["--workers", "0", "--batch-size", "2"]
    run = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True)
    assert run.returncode == -signal.SIGKILL and not output.exists()
    assert main(words) == 0
    assert "goes on, 4 of 8 are embedded" in caplog.text
    whole = tmp_path / "whole.safetensors"
    assert main([*words[:5], str(whole), *words[6:]]) == 0
    one, other = Embeddings.load(output), Embeddings.load(whole)
    assert one.names == other.names and torch.equal(one.rows(), other.rows())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_new_or_changed(
    embedder: Embedder, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "clips.safetensors"
    assert embed(embedder, list_media([clips], "video"), "video", output).reused == 0
    first, second, *_ = sorted((clips / "more").iterdir())
    shutil.copy(second, first)  # changed
    shutil.copy(second, clips / "new.mp4")
    second.unlink()
    done = embed(embedder, list_media([clips], "video"), "video", output)
    assert done.reused == 6 and len(done.embeddings) == 8
    rows = dict(zip(done.embeddings.names, done.embeddings.rows(), strict=True))
    torch.testing.assert_close(rows[str(first)], rows[str(clips / "new.mp4")])
    (clips / "new.mp4").write_bytes(b"now broken")
    done = embed(embedder, list_media([clips], "video"), "video", output)
    assert len(done.embeddings) == 7 and len(done.skipped.reasons) == 1
    shutil.copy(first, clips / "other.mp4")

    def not_finite(*_: Any) -> None:
        raise ValueError("embed: embeddings: not finite")

    monkeypatch.setattr(
        module, "check_finite", not_finite
    )  # said beside a file that is skipped too
    with pytest.raises(ValueError, match="not finite"):
        embed(embedder, list_media([clips], "video"), "video", output)


def test_refusals(
    model: Path,
    embedder: Embedder,
    make_recipe: Any,
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "clips.safetensors"
    embed(embedder, list_media([clips], "video"), "video", output)
    other = pretrain(make_recipe(tmp_path / "run", "optimizer.steps=1", "seed=3")).folder
    capsys.readouterr()

    def refused(line: str, *words: str) -> None:
        assert main(list(words)) == 2
        assert line in capsys.readouterr().err

    to = ["--output", str(output)]
    refused("embed: --videos, --images or --texts must be given, got 0", "embed", str(model), *to)
    both = ["--videos", str(clips), "--texts", "a"]
    refused("must be given, got 2", "embed", str(model), *both, *to)
    refused("has videos by SViTTForPreTraining", "embed", str(model), "--texts", "a", *to)
    refused("remove it, or give another", "embed", str(other), "--videos", str(clips), *to)
    npz = ["--output", "e.npz"]
    refused("must end in .safetensors", "embed", str(model), "--texts", "a", *npz)
    refused("model: must be the folder", "embed", "nothing", "--texts", "a", *to)
    search = ["search", str(output)]
    refused("--model: must be the one that", *search, "a", "--model", str(other))
    refused("query: must be a text or a file", *search, " ", "--model", str(model))
    refused("query: must have words", *search, "...", "--model", str(model))
    refused("'x.mp4', which is not there", *search, "x.mp4", "--model", str(model))
    refused("--top: must be at least 1", *search, "a", "--model", str(model), "--top", "0")
    refused("embeddings: must be a file", "search", "no", "a", "--model", str(model))
    text = str(clips / "note.txt")
    Path(text).write_text("x")
    refused("must be a file of `svitt embed`", "search", text, "a", "--model", str(model))
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    alone = ["--videos", str(tmp_path / "broken.mp4"), "--output", str(tmp_path / "b.safetensors")]
    refused("no video could be read; the first:", "embed", str(model), *alone)
    assert not (tmp_path / "b.safetensors").exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "save_file", full)
    fresh = ["--videos", str(clips), "--output", str(tmp_path / "f.safetensors")]
    refused("cannot be written: No space left", "embed", str(model), *fresh)
