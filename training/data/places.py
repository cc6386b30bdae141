"""Names of media that are no files: in a shard, in a row of a dataset, frames with their rate.

Such a name is one text, as a path is, so that whoever passes names on need not know of it. A NUL,
which no path holds, stands between the path and what is meant in there.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any, Literal

Form = Literal["file", "member", "row", "frames"]
NUL = "\0"
FACTS = {"member": (str, int, int), "row": (str, int, int), "frames": (float,)}


class Place(str):
    """A name that `place` has made; what an annotation says never is one."""


def place(path: str | os.PathLike[str], form: Form, *facts: Any) -> Place:
    """The name of something inside of a path.

    Args:
        path: a tar archive, a Hugging Face dataset, or a folder of frames.
        form: "member": `facts` are its name, and where its bytes begin in the archive and how many
            they are; "row": the column, the number of the row, and that of the element where the
            row has a list, else 0; "frames": how many make a second.
        facts: what JSON holds.
    """
    return Place(f"{os.fspath(path)}{NUL}{json.dumps([form, *facts])}")


def parse(name: str) -> tuple[str, Form, list[Any]]:
    """Path, form and facts of a name; any that `place` has not made is a file's."""
    path, separator, rest = name.partition(NUL)
    if separator:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            form, *facts = json.loads(rest)
            if FACTS[form] == tuple(map(type, facts)):
                return path, form, facts
    return name, "file", []


def label(name: str) -> str:
    """What to call it in messages, and what its suffix may be told by."""
    path, form, facts = parse(name)
    if form == "member":
        return f"{path}/{facts[0]}"
    return f"{path}, row {facts[1]}" if form == "row" else path


def is_there(name: str) -> bool:
    """Whether its file is; a dataset was opened when the name was made."""
    path, form, _ = parse(name)
    return form == "row" or os.path.exists(path)
