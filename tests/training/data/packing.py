"""Annotated files as people pack them: webdataset shards, and Hugging Face datasets."""

import json
from pathlib import Path
from typing import Any

import datasets
import webdataset

Entries = list[dict[str, Any]]


def write_shards(folder: Path, annotations: Path, count: int = 5) -> Path:
    """Shards of `count` samples each, with captions as texts and all other fields as JSON."""
    folder.mkdir()
    entries: Entries = json.loads(annotations.read_text())
    with webdataset.ShardWriter(str(folder / "train-%06d.tar"), maxcount=count, verbose=0) as out:
        for number, entry in enumerate(entries):
            kind = "image" if "image" in entry else "video"
            path = annotations.parent / entry[kind]
            fields = {k: v for k, v in entry.items() if k not in (kind, "caption")}
            texts = {"txt": entry["caption"]} if "caption" in entry else {}
            key = f"{number:09}"
            out.write({"__key__": key, path.suffix[1:]: path.read_bytes(), "json": fields, **texts})
    return folder


def dataset_of(annotations: Path) -> Any:
    """The rows with their media as bytes, in a column `clip`; `text` is the caption."""
    columns: dict[str, list[Any]] = {"clip": []}
    for entry in json.loads(annotations.read_text()):
        path = annotations.parent / entry.pop("video", entry.pop("image", ""))
        columns["clip"].append({"bytes": path.read_bytes(), "path": path.name})
        for name, value in entry.items():
            columns.setdefault("text" if name == "caption" else name, []).append(value)
    return datasets.Dataset.from_dict(columns)


def write_dataset(folder: Path, annotations: Path) -> Path:
    """A dataset of two files, as `save_to_disk` writes it."""
    dataset_of(annotations).save_to_disk(folder, num_shards=2)
    return folder
