"""Still and animated pictures through Pillow, recognised by their first bytes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svitt_ops.training.data.decoding import fit
from svitt_ops.training.data.files import MAX_PIXELS, MediaFile, Reader, UnusableVideoError

JPEG = b"\xff\xd8\xff"
BEGINNINGS = {
    JPEG: "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG2000",
    b"\xff\x4f\xff\x51": "JPEG2000",
    **{b"P%d" % k + space: "PPM" for k in range(1, 7) for space in (b"\n", b" ", b"\r", b"\t")},
}
ANIMATED = ("PNG", "WEBP", "AVIF")  # the pages of a TIFF or of a JPEG are no film
TARGA = b"TRUEVISION-XFILE.\0"  # at the end
REDUCED = 254  # TIFF's tag of pictures that stand for others, as in a camera's raw files
ORIENTATION = 0x0112
logging.getLogger("PIL").addHandler(logging.NullHandler())  # its errors are raised, too
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Pictures:
    """The picture of a file, or the frames of an animated one."""

    def __init__(self, file: MediaFile, form: str) -> None:
        self._file = file
        self._form = form
        self.seconds = [0.0]
        with self._opened() as image:
            count = getattr(image, "n_frames", 1) if form in ANIMATED else 1
            # A PNG may show another picture to those who don't know that it moves.
            self._first = int(bool(getattr(image, "default_image", False)) and count > 1)
            if count - self._first > 1:
                self.seconds = []
                now = 0.0
                for number in range(self._first, count):
                    image.seek(number)
                    image.load()
                    self.seconds.append(now)
                    now += max(1, image.info.get("duration", 0)) / 1000

    def read(self, positions: set[int], short_side: int | None) -> dict[int, Tensor]:
        """The pictures at some positions."""
        found = {}
        with self._opened() as image:
            for position in sorted(positions):
                if position or self._first:
                    image.seek(self._first + position)
                image.load()
                found[position] = to_pixels(image, short_side)
        return found

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and odd tags
            with Image.open(Reader(self._file), formats=[self._form]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnusableVideoError(f"has {image.width} x {image.height} pixels")
                if self._form == "TIFF" and image.tag_v2.get(REDUCED, 0) & 1:  # type: ignore[attr-defined]
                    raise UnusableVideoError("begins with a thumbnail, as a camera's raw file does")
                yield image


def open_pictures(file: MediaFile) -> Pictures | None:
    """The pictures of a file, None where FFmpeg is to read it."""
    form = _recognise(file)
    if form is None:
        return None
    try:
        return Pictures(file, form)
    except Image.UnidentifiedImageError:
        return None  # a variant that FFmpeg may know, as JPEG with 12 bits


def _recognise(file: MediaFile) -> str | None:
    head = file.read(0, 64)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"):
        return "AVIF"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"mif1"):
        if b"infe" in (items := file.read(0, 2**16)) and b"grid" in items:
            raise UnusableVideoError("is a HEIF picture made of tiles: convert it to JPEG or PNG")
        return None
    form = next((form for begin, form in BEGINNINGS.items() if head.startswith(begin)), None)
    if form is None and file.size > 44 and file.read(file.size - len(TARGA), 32) == TARGA:
        return "TGA"
    return None if form == "JPEG" and _is_film(file) else form


def _is_film(file: MediaFile) -> bool:
    """Whether JPEG pictures follow each other without a list of them, as in motion JPEG."""
    content = file.read(0, 2**24)
    position = 2
    while (marker := content[position : position + 2])[:1] == b"\xff":
        if marker == b"\xff\xda":  # the picture begins; a thumbnail before it ends on its own
            end = content.find(b"\xff\xd9", position)
            return end >= 0 and content.startswith(JPEG, end + 2) and b"MPF\0" not in content[:end]
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")
    return False


def to_pixels(image: Image.Image, short_side: int | None) -> Tensor:
    """uint8 (3, height, width), upright."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the picture is there, whatever was written about it
        orientation = 1
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise UnusableVideoError(f"has numbers of mode {image.mode}, not colours")
    image = image.convert("RGB")
    size = fit(image.size, short_side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BOX)
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
