"""Files, shards and datasets of the same samples are the same to who trains on them."""

import io
import json
import os
import pickle
import re
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("webdataset")
pytest.importorskip("datasets")

import datasets
import numpy as np
import webdataset
from films import film
from packing import dataset_of, write_dataset, write_shards
from PIL import Image
from torch.utils.data import DataLoader

from svitt_ops.training.data import rows
from svitt_ops.training.data.annotations import Annotations, read_annotations
from svitt_ops.training.data.collate import Collator
from svitt_ops.training.data.datasets import Clip, ClipSpec, GlobalBatches, PairDataset
from svitt_ops.training.data.features import read_features
from svitt_ops.training.data.places import Place, label
from svitt_ops.training.data.sources import find_source
from svitt_ops.training.data.text import clean_caption, train_tokenizer
from svitt_ops.training.data.timeline import timelines
from svitt_ops.training.data.video import UnusableVideoError, read_frames
from svitt_ops.training.embeddings.listing import list_media, list_texts
from svitt_ops.training.engine.recipes import load_recipe
from svitt_ops.training.tasks.reasoning import FORM

pytestmark = pytest.mark.usefixtures("one_thread")
REPOSITORY = Path(__file__).parents[3]
COLUMNS = {"video": "clip", "caption": "text"}


@pytest.fixture(scope="module")
def packed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same pairs by the form that they are kept in, of which each has its arguments."""
    folder = tmp_path_factory.mktemp("packed")
    annotations = corpus / "train.json"
    shards = write_shards(folder / "shards", annotations)
    parquet = folder / "parquet"
    parquet.mkdir()
    whole = dataset_of(annotations)
    for number in (0, 1):
        whole.shard(2, number).to_parquet(parquet / f"part-{number}.parquet")
    whole.save_to_disk(folder / "one")
    renamed = whole.rename_columns({ours: theirs for theirs, ours in COLUMNS.items()})
    renamed.cast_column("video", datasets.Video()).save_to_disk(folder / "typed")
    return {
        "file": {"path": annotations},
        "folder": {"path": shards},
        "braces": {"path": f"{shards}/train-{{000000..000003}}.tar"},
        "pattern": {"path": f"{shards}/*.tar"},
        "saved": {"path": write_dataset(folder / "saved", annotations), "columns": COLUMNS},
        "parquet": {"path": parquet, "columns": COLUMNS},
        "one parquet": {"path": f"{parquet}/part-{{0..1}}.parquet", "columns": COLUMNS},
        "typed": {"path": folder / "typed"},
    }


def pairs(given: dict[str, Any], **spec: Any) -> PairDataset:
    read = read_annotations(**given, keep_together="scene")
    assert not read.problems
    return PairDataset(read.entries, ClipSpec(num_frames=4, **spec), positives="caption", seed=3)


FORMS = ("folder", "braces", "pattern", "saved", "parquet", "one parquet", "typed")


@pytest.mark.parametrize("form", FORMS)
def test_the_same_batch_as_from_files(form: str, packed: dict[str, Any]) -> None:
    captions = [e.captions[0] for e in read_annotations(**packed["file"]).entries]
    collate = Collator(tokenizer=train_tokenizer(captions, 100), mask_probability=0.5)
    wanted, found = pairs(packed["file"]), pairs(packed[form])
    batches = [GlobalBatches(dataset.items, 8, seed=1) for dataset in (wanted, found)]
    assert batches[0].epoch(2) == batches[1].epoch(2)
    for numbers in batches[0].epoch(2):
        one, other = (collate([d[k, 2] for k in numbers]) for d in (wanted, found))
        assert one.keys() == other.keys()
        for name, value in one.items():
            same = torch.equal if isinstance(value, torch.Tensor) else (lambda a, b: a == b)
            assert same(value, other[name]), name


@pytest.mark.parametrize("form", ["folder", "saved"])
def test_an_epoch_of_two_ranks_has_every_sample_once(form: str, packed: dict[str, Any]) -> None:
    """Each rank with two workers, more of them than shards; the second half from a new start."""
    dataset = pairs(packed[form])
    taken: Counter[str] = Counter()
    for rank, start in ((0, 2), (1, 2), (0, 3), (1, 3)):  # of two batches an epoch
        batches = GlobalBatches(dataset.items, 8, seed=5, rank=rank, world_size=2, start=start)
        loader = DataLoader(
            dataset, batch_sampler=batches, num_workers=2, collate_fn=lambda clips: clips
        )
        clips: list[Clip] = next(iter(loader))
        assert len(clips) == 4
        assert not any(clip.skipped for clip in clips)
        taken.update(clip.caption for clip in clips)
    assert taken == Counter(text for item in dataset.items for text in item.captions)
    assert set(taken.values()) == {1} and len(taken) == len(dataset) == 16


def test_a_dataset_goes_to_a_worker_that_was_not_forked(packed: dict[str, Any]) -> None:
    for form in ("folder", "saved"):
        dataset = pairs(packed[form])
        rows.open_dataset.cache_clear()
        rows._column.cache_clear()
        again = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(again[3, 0].frames, pairs(packed["file"])[3, 0].frames)


def test_what_webdataset_reads(packed: dict[str, Any]) -> None:
    """Keys and members are those of the library."""
    wanted = webdataset.WebDataset(
        [str(file) for file in find_source(packed["folder"]["path"]).files], shardshuffle=False
    )
    entries = read_annotations(**packed["folder"]).entries
    for sample, entry in zip(wanted, entries, strict=True):
        place = entry.media[0]
        assert label(place) == f"{sample['__url__']}/{sample['__key__']}.mp4"
        archive, _, rest = place.partition("\0")
        _, _, start, size = json.loads(rest)
        assert Path(archive).read_bytes()[start : start + size] == sample["mp4"]
        assert entry.captions == (clean_caption(sample["txt"].decode()),)


Members = list[tuple[str, bytes]]


def archive(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
    return path


def read(path: Path | str, **given: Any) -> Annotations[Any]:
    return read_annotations(path, **given)


def test_what_macos_adds_is_passed_over(tmp_path: Path) -> None:
    members = [(f"a/{dot}0.{suffix}", b"x") for suffix in ("mp4", "txt") for dot in ("._", "")]
    found = read(archive(tmp_path / "a.tar", members))
    assert len(found.entries) == 1 and not found.problems


def test_shards_are_no_files_to_embed(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", [("0.mp4", b"x"), ("0.txt", b"a dog")])
    for given in (path, tmp_path / "*.tar"):
        with pytest.raises(ValueError, match=r"must name files, got .*a.tar, which holds videos"):
            list_media([given], "video")
    with pytest.raises(ValueError, match=r"--texts: must be texts or lists of them, got '.*a.tar'"):
        list_texts([str(path)])


def test_samples_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 4, size=(16, 16)).read_bytes()
    path = archive(
        tmp_path / "a.tar",
        [
            *(("good.mp4", clip), ("good.txt", b"A dog."), ("good.json", b'{"video": "/etc/x"}')),
            *(("mute.mp4", clip), ("mute.json", b"{}")),
            *(("empty.mp4", clip), ("empty.txt", b" ")),
            *(("null.mp4", clip), ("null.json", b'{"caption": null}')),
            *(("odd.mp4", clip), ("odd.txt", b"\xff\xfe\xfd")),
            *(("cut.mp4", clip), ("cut.json", b'{"caption": ')),
            *(("list.mp4", clip), ("list.json", b"[1]")),
            ("blind.txt", b"No film."),
            *(("two.mp4", clip), ("two.mp4", clip), ("two.txt", b"Twice.")),
            *(("good.mp4", clip), ("good.txt", b"Again.")),
            *(("many.0.mp4", clip), ("many.1.mp4", clip), ("many.txt", b"Which?")),
            *(("dir/last.MP4", clip), ("dir/last.txt", b"A cat."), (".hidden", b"")),
            *(("__meta__/x.mp4", clip), ("__meta__/x.txt", b"Nothing.")),
        ],
    )
    found = read(path)
    assert [entry.captions for entry in found.entries] == [("a dog",), ("a cat",)]
    said = {
        problem.removeprefix(f"{path}: a.tar: sample ").partition(": ")[::2]
        for problem in found.problems
    }
    wanted = {
        "mute": "has no field 'caption'; has 'mp4', 'video'",
        "empty": "field 'caption' has no words",
        "null": "field 'caption' must be text, got NoneType",
        "odd": "its txt cannot be read: 'utf-8'",
        "cut": "its json cannot be read: Expecting value",
        "list": "its json must be an object, got list",
        "blind": "has no field 'video'; has 'txt', 'caption'",
        "two": "has 'two.mp4' twice",
        "good": "is there twice",
        "many": "has no field 'video'; has '0.mp4', '1.mp4', 'txt', 'caption'",
    }
    assert len(said) == len(wanted)
    for key, reason in said:
        assert reason.startswith(wanted[key]), key
    chosen = read(path, columns={"video": "1.mp4"}).entries
    assert [entry.captions for entry in chosen] == [("which",)]


def test_a_broken_member_is_replaced_and_named(tmp_path: Path) -> None:
    held = film(tmp_path / "a.mp4", 4, size=(16, 16)).read_bytes()
    members = [("0.mp4", b"no film"), ("1.mp4", held), ("2.mp4", b"")]
    texts = [(f"{number}.txt", b"Text.") for number in range(3)]
    path = archive(tmp_path / "a.tar", sorted([*members, *texts]))
    dataset = PairDataset(read(path).entries, ClipSpec(num_frames=2))
    for number, reason in ((0, "Invalid data"), (2, "is empty")):
        clip = dataset[number, 0]
        assert clip.frames.shape == (2, 3, 16, 16)
        assert clip.skipped[0][1].startswith(f"{path}/{number}.mp4: {reason}")


def test_archives_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    members = [(f"{k}.{s}", bytes(3000)) for k in range(3) for s in ("mp4", "json")]
    content = archive(tmp_path / "whole.tar", members).read_bytes()
    broken: dict[str, tuple[bytes, str]] = {
        "cut in a member": (content[:5000], "cannot be read as a tar archive: unexpected end"),
        "cut in a header": (content[: 512 * 7 + 100], "is cut off or damaged at byte 3584"),
        "cut before a header": (content[: 512 * 7], "is cut off or damaged at byte 3584"),
        "a damaged header": (
            content[: 512 * 7] + b"x" * 512 + content[512 * 8 :],
            "is cut off or damaged at byte 3584",
        ),
        "two archives": (content * 2, "holds more after its end at byte "),
        "no archive": (b"x" * 5000, "cannot be read as a tar archive"),
        "nothing": (b"", "cannot be read as a tar archive: empty file"),
    }
    for name, (changed, reason) in broken.items():
        path = tmp_path / f"{name}.tar"
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=re.escape(f"annotations {path}: {reason}")) as error:
            read(path)
        assert "\n" not in str(error.value)
    gone = tmp_path / "shards"
    gone.mkdir()
    shutil.copy(tmp_path / "whole.tar", gone / "a-0.tar")
    (gone / "a.txt").touch()
    wrong = {
        f"{gone}/a-{{0..1}}.tar": r"got '.*/a-1.tar', which cannot be read: No such file",
        f"{gone}/b-*.tar": r"^annotations: must match a file at least, got '.*/b-\*.tar'$",
        f"{gone}/*": r"^annotations: must match .tar or .parquet files alone, got ",
        f"{gone}/{{a,b}}-*.tar": r"got '.*/b-\*.tar', which cannot be read: No such file",
        f"{gone}/{{a-*.tar": "^annotations: Unbalanced braces",
        f"{tmp_path}/none": "No such file",
    }
    for given, reason in wrong.items():
        with pytest.raises(ValueError, match=reason):
            find_source(given)
    assert len(find_source(f"{gone}/{{a-0,*}}.tar").files) == 1
    (gone / "a-1.tar.gz").touch()
    with pytest.raises(ValueError, match=r"must not be compressed, .* has a-1.tar.gz"):
        find_source(gone)
    (tmp_path / "exported").mkdir()
    for split in ("train", "test"):
        (tmp_path / "exported" / f"{split}-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match=r"must be one split, .* has test, train: "):
        find_source(tmp_path / "exported")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"must be a file, or a folder with .tar shards, .parquet"):
        find_source(tmp_path / "empty")


def test_a_shard_that_changes_is_no_other_sample(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 4, size=(16, 16)).read_bytes()
    path = archive(tmp_path / "a.tar", [("0.mp4", clip), ("0.txt", b"Text.")])
    (entry,) = read(path).entries
    with pytest.raises(ValueError, match=r"^--videos: must name files, got .*/a.tar, which holds"):
        list_media([path], "video")
    os.truncate(path, len(clip))
    with pytest.raises(UnusableVideoError, match=r"a.tar/0.mp4: is cut off$"):
        read_frames(entry.media[0])


def test_datasets_that_cannot_be_read_are_named(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = write_dataset(tmp_path / "saved", corpus / "train.json")
    columns = "'clip', 'text', 'scene'"
    with pytest.raises(ValueError) as error:
        read(saved, columns={"video": "film"})
    assert str(error.value) == f"annotations {saved}: has no column 'film'; has {columns}"
    with pytest.raises(ValueError, match=r"no usable entry among 16; .*: row 0: has no field 'vi"):
        read(saved)
    datasets.DatasetDict(train=datasets.load_from_disk(saved)).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"must be one split, .*/splits has train: .*/splits/NAME"):
        read(tmp_path / "splits")
    assert len(read(tmp_path / "splits" / "train", columns=COLUMNS).entries) == 16
    shutil.copytree(saved, tmp_path / "cut")
    part = next((tmp_path / "cut").glob("*.arrow"))
    os.truncate(part, part.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"^annotations .*/cut: cannot be opened as a dataset: "):
        read(tmp_path / "cut", columns=COLUMNS)
    with pytest.raises(ValueError, match=r"dataset: takes name, split, revision, got columns$"):
        read("hf://user/data?columns=a")
    asked: dict[str, Any] = {}

    def load(path: str, **given: Any) -> Any:
        asked.update(given, path=path)
        whole = datasets.load_from_disk(saved)
        return whole.select([]) if path == "user/none" else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read("hf://user/data?name=a&split=train[:9]", columns=COLUMNS).entries) == 16
    assert asked == {"path": "user/data", "name": "a", "split": "train[:9]"}
    with pytest.raises(ValueError, match=r"^annotations hf://user/none: has no rows$"):
        read("hf://user/none")
    assert asked == {"path": "user/none", "name": "a", "split": "train"}


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    clip = film(tmp_path / "a.mp4", 4, size=(16, 16))
    held = clip.read_bytes()
    media = [
        *({"bytes": held, "path": None}, {"bytes": held, "path": "a.mp4"}),
        *({"bytes": None, "path": str(clip)}, {"bytes": None, "path": None}),
        *(None, {"bytes": b"", "path": None}),
    ]
    table = {"video": media, "caption": ["A dog.", None, "A cat.", "None.", "None.", "Empty."]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "data")
    found = read(tmp_path / "data")
    assert [entry.captions[0] for entry in found.entries] == ["a dog", "a cat", "empty"]
    assert [problem.partition(": ")[2] for problem in found.problems] == [
        "row 1: field 'caption' must be text, got NoneType",
        "row 3: field 'video' must be text, got NoneType",
        "row 4: field 'video' must be text, got NoneType",
    ]
    assert found.entries[1].media == (str(clip),)
    assert torch.equal(read_frames(found.entries[0].media[0]), read_frames(clip))
    with pytest.raises(UnusableVideoError, match=r"/data, row 5: is empty$"):
        read_frames(found.entries[2].media[0])


def test_pictures_pairs_and_features(tmp_path: Path) -> None:
    """Other kinds of media than films, in an archive and in rows."""
    content = {}
    for name, colour in (("left", "red"), ("right", "blue")):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
        content[name] = buffer.getvalue()
    pair = [(f"a.{name}.png", data) for name, data in content.items()]
    fields = json.dumps({"sentence": "Two.", "label": "True"}).encode()
    path = archive(tmp_path / "pairs.tar", [*pair, ("a.json", fields)])
    rows_ = {"images": [[*content.values()]], "sentence": ["Two."], "label": ["True"]}
    datasets.Dataset.from_dict(rows_).save_to_disk(tmp_path / "pairs")
    for source in (path, tmp_path / "pairs"):
        (entry,) = read(source, kind="image", form=FORM).entries
        left, right = (read_frames(name)[0, :, 0, 0].tolist() for name in entry.media)
        assert (left, right) == ([255, 0, 0], [0, 0, 255])
    array = torch.arange(6.0).reshape(3, 2)
    buffer = io.BytesIO()
    np.save(buffer, array.numpy())
    path = archive(tmp_path / "f.tar", [("a.npy", buffer.getvalue()), ("a.txt", b"Numbers.")])
    (entry,) = read(path).entries
    assert torch.equal(read_features(entry.media[0], lambda times: [2, 0], 2), array[[2, 0]])


def test_columns_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("File,What\na.mp4,A dog.\n")
    found = read(tmp_path / "a.csv", columns={"video": "File", "caption": "What"})
    assert [(e.media, e.captions) for e in found.entries] == [
        ((str(tmp_path / "a.mp4"),), ("a dog",))
    ]
    (tmp_path / "a.json").write_text('[{"video": "a.mp4", "text": "A dog."}]')
    assert read(tmp_path / "a.json", columns={"caption": "text"}).entries
    with pytest.raises(ValueError, match=r"entry 0: has no field 'words'; has 'video', 'text'$"):
        read(tmp_path / "a.json", columns={"caption": "words"})


def test_a_name_with_a_nul_stays_a_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"secret")
    name = f"{tmp_path}/a.tar\0" + json.dumps(["member", "a.mp4", 0, 6])
    (tmp_path / "a.json").write_text(json.dumps([{"video": name, "caption": "A dog."}]))
    with pytest.raises(ValueError, match="which can name no file"):
        read(tmp_path / "a.json")
    assert not isinstance(name, Place)
    for odd in ("5", "[]", '["member"]', '["row", "a", 0]', '["x", 1]', '[["row"]]', "[" * 9999):
        with pytest.raises(UnusableVideoError, match="null"):
            read_frames(f"{tmp_path}/a.tar\0{odd}")


def test_timelines_of_members_are_kept_apart(tmp_path: Path) -> None:
    clips = [film(tmp_path / f"{k}.mp4", 4 + k, size=(16, 16)).read_bytes() for k in range(2)]
    members = [m for k, c in enumerate(clips) for m in ((f"{k}.mp4", c), (f"{k}.txt", b"Text."))]
    path = archive(tmp_path / "a.tar", members)
    os.utime(path, (1e9, 1e9))
    before = len(timelines)
    for _ in range(2):
        lengths = [len(read_frames(entry.media[0])) for entry in read(path).entries]
        assert lengths == [4, 5]
    assert len(timelines) == before + 2


def test_the_guide(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code packs what is then read, and its recipe has keys that there are."""
    guide = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    recipe = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert (len(code), len(recipe)) == (1, 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").symlink_to(corpus)
    shutil.copy(corpus / "train.json", "my.json")
    exec(code[0], {})
    packed_ = read(f"{tmp_path}/train-{{000000..000000}}.tar").entries
    assert [e.captions for e in packed_] == [
        e.captions for e in read(corpus / "train.json").entries
    ]
    Path("recipe.yaml").write_text(recipe[0])
    train = load_recipe("recipe.yaml").data.train
    assert [corpus_.fps for corpus_ in train] == [None, None, None, 25]
    assert train[1].annotations == "hf://user/data?split=train"
