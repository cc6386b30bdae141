"""Paths as people write them, and files that cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from svitt_ops.training.data import paths


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_home_is_filled_in(tmp_path: Path) -> None:
    assert paths.expand("~/v") == tmp_path / "v"
    assert paths.expand("~") == tmp_path
    assert paths.expand("~root/v") == Path(os.path.expanduser("~root")) / "v"
    assert paths.expand("a/~/v") == Path("a/~/v")


@pytest.mark.parametrize("path", ["", "a\0b", "a\ud800b"])
def test_what_is_no_path_is_named(path: str) -> None:
    with pytest.raises(ValueError, match="--root: must be a path, got"):
        paths.expand(path, "--root")


def test_an_unknown_user_is_named() -> None:
    with pytest.raises(ValueError, match="--root: must be a path, got '~nobody-here/v': there is"):
        paths.expand("~nobody-here/v", "--root")


def test_inputs(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert paths.input_file("~/a", "x") == tmp_path / "a"
    assert paths.input_folder("~", "x") == tmp_path
    for check, path, reason in (
        (
            paths.input_file,
            "~/no",
            "must be a file, got '~/no', which cannot be read: No such file",
        ),
        (paths.input_file, "~", "it is a folder"),
        (paths.input_folder, "~/a", "must be a folder, got '~/a': it is no folder"),
        (paths.input_folder, "~/no", "must be a folder, got '~/no': No such file"),
        (paths.input_folder, "~/a/b", "Not a directory"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            check(path, "key")
        assert str(error.value).startswith("key: ")


def test_outputs(tmp_path: Path) -> None:
    assert paths.output_file("~/new/deep/a.json", "x") == tmp_path / "new" / "deep" / "a.json"
    assert (tmp_path / "new" / "deep").is_dir()
    assert not (tmp_path / "new" / "deep" / "a.json").exists()
    assert paths.output_folder("~/runs", "x").is_dir()
    (tmp_path / "file").touch()
    for check, path, reason in (
        (paths.output_file, "~", "must be a file to write, got '~': it is a folder"),
        (paths.output_file, "~/file/a.json", "must be a folder to write to"),
        (paths.output_folder, "~/file", "there is a file of that name"),
        (paths.output_folder, "~/file/a", "Not a directory"),
        (paths.output_folder, "/proc/no", "must be a folder to write to, got '/proc/no'"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            check(path, "key")
        assert str(error.value).startswith("key: ")


def test_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    for check, path in (
        (paths.output_folder, "~"),
        (paths.output_file, "~/file"),
        (paths.output_file, "~/new"),
        (paths.input_file, "~/file"),
        (paths.input_folder, "~"),
    ):
        with pytest.raises(ValueError, match="Permission denied"):
            check(path, "key")


def test_a_full_disk_is_named() -> None:
    with pytest.raises(OSError, match="/dev/full") as error:
        paths.write_text("/dev/full", "x")
    assert error.value.errno == errno.ENOSPC
