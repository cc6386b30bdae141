"""Where a file keeps its payload, and how long it says it is.

With the payload known, FFmpeg lists the frames without it being read. What these walks don't
understand is left to be read.
"""

from __future__ import annotations

from collections.abc import Iterator

from svitt_ops.training.data.files import MediaFile

Spans = list[tuple[int, int]]
UNKNOWN = 2**31 - 16  # and more say those who write into a pipe
FILLED = (b"moov", b"moof", b"mdat")  # what frames are made of; the rest may be no box at all
# Matroska: what is entered, and what holds a frame.
SEGMENT, CLUSTER, BLOCK_GROUP = 0x18538067, 0x1F43B675, 0xA0
SIMPLE_BLOCK, BLOCK = 0xA3, 0xA1
KEPT = 16  # of a block: its head, and the first bytes of its frame
FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # an object of ASF


def payload(file: MediaFile, container: str) -> Spans:
    """Spans of payload, ascending, of a container by FFmpeg's name; none where it is unknown."""
    if container.startswith("mov"):
        return _mp4(file)
    if container.startswith("matroska"):
        return _matroska(file)
    return []


def declared_size(file: MediaFile, container: str) -> int:
    """How many bytes the structure of a file needs, 0 where it doesn't say."""
    if container == "avi":
        size = int.from_bytes(file.read(4, 4), "little")
        return 8 + size if size < UNKNOWN else 0
    if container.startswith("mov"):
        return max((end for name, _, end in _boxes(file) if name in FILLED), default=0)
    if container == "asf":
        head = file.read(0, 2**16)
        facts = head[head.find(FILE_PROPERTIES) :][:96]
        live = facts[88:89] != b"" and facts[88] & 1
        return 0 if live or FILE_PROPERTIES not in head else int.from_bytes(facts[40:48], "little")
    return 0


def _mp4(file: MediaFile) -> Spans:
    """The media data boxes."""
    spans = [(start, min(end, file.size)) for name, start, end in _boxes(file) if name == b"mdat"]
    return [(start, end) for start, end in spans if start < end]


def _boxes(file: MediaFile) -> Iterator[tuple[bytes, int, int]]:
    """Name, begin and end of what the boxes at the top of an MP4 hold."""
    position = 0
    for _ in _steps(file):
        head = file.read(position, 16)
        size, start = int.from_bytes(head[:4], "big"), position + 8
        if size == 1:  # a size of 64 bits follows
            size, start = int.from_bytes(head[8:16], "big"), position + 16
        elif size == 0:  # to the end of the file
            size = file.size - position
        end = position + size
        if len(head) < 8 or end < start:
            return
        yield head[4:8], start, end
        position = end


def _steps(file: MediaFile) -> range:
    """As many as are worth it: of smaller parts, what lies between them may as well be read."""
    return range(1000 + file.size // 128)


def _matroska(file: MediaFile) -> Spans:
    """The blocks, but for their first bytes."""
    spans: Spans = []
    position = 0
    for _ in _steps(file):
        head = file.read(position, 32)
        if len(head) < 32:
            break
        width = 9 - head[0].bit_length()
        name = int.from_bytes(head[:width], "big")
        more = 9 - head[width].bit_length() if width <= 4 else 9
        if more > 8:
            break
        known = (1 << 7 * more) - 1  # all ones: a size that the writer did not know
        size = int.from_bytes(head[width : width + more], "big") & known
        start = position + width + more
        if name in (SEGMENT, CLUSTER, BLOCK_GROUP):
            position = start
            continue
        if size == known:
            break
        if name in (SIMPLE_BLOCK, BLOCK):
            flags = head[width + more + 3]  # behind a track number of one byte and the time
            alone = head[width + more] & 0x80 and not flags & 0x06  # not several frames laced
            if alone and size > 4 * KEPT:
                spans.append((start + KEPT, min(start + size, file.size)))
        position = start + size
    return [(start, end) for start, end in spans if start < end]
