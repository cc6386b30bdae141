"""Still and animated pictures of the size and noise of real ones, and what is wrong with some."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from svitt_ops.training.data.video import UnusableVideoError, read_frames

WIDTH, HEIGHT = 640, 480


def photo(seed: int = 0, channels: int = 3) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = 60 * np.sin(x / 23 + seed) + 50 * np.cos(y / 17) + 100 * (x > y)
    noise = np.random.default_rng(seed).normal(0, 10, (HEIGHT, WIDTH, channels))
    tint = 15 * np.arange(channels)
    return (90 + waves[..., None] + tint + noise).clip(0, 255).astype(np.uint8)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB")).transpose(2, 0, 1))


SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline.jpg": ("RGB", {"quality": 92}),
    "progressive.jpg": ("RGB", {"quality": 85, "progressive": True}),
    "full_chroma.jpg": ("RGB", {"quality": 95, "subsampling": 0}),
    "restarts.jpg": ("RGB", {"restart_marker_blocks": 10}),
    "grey.jpg": ("L", {}),
    "cmyk.jpg": ("CMYK", {}),
    "colour.png": ("RGB", {}),
    "alpha.png": ("RGBA", {}),
    "grey.png": ("L", {}),
    "grey_alpha.png": ("LA", {}),
    "palette.png": ("P", {}),
    "bits.png": ("1", {}),
    "transparent.png": ("P", {"transparency": 3}),
    "lossy.webp": ("RGB", {"quality": 80}),
    "lossless.webp": ("RGBA", {"lossless": True}),
    "colour.bmp": ("RGB", {}),
    "palette.bmp": ("P", {}),
    "colour.tiff": ("RGB", {}),
    "lzw.tiff": ("RGB", {"compression": "tiff_lzw"}),
    "jpeg.tiff": ("RGB", {"compression": "jpeg"}),
    "cmyk.tiff": ("CMYK", {}),
    "big.tiff": ("RGB", {"big_tiff": True}),
    "colour.ppm": ("RGB", {}),
    "grey.pgm": ("L", {}),
    "bits.pbm": ("1", {}),
    "a.jp2": ("RGB", {}),
    "a.j2k": ("RGB", {}),
    "a.avif": ("RGB", {"quality": 80}),
    "a.tga": ("RGB", {}),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_picture_is_what_pillow_makes_of_it(tmp_path: Path, name: str) -> None:
    mode, options = SAVED[name]
    path = tmp_path / name
    image = Image.fromarray(photo())
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(photo(1, 1)[..., 0]))
    image.convert(mode).save(path, **options)
    frames = read_frames(path)
    assert frames.shape == (1, 3, HEIGHT, WIDTH)
    with Image.open(path) as again:
        assert torch.equal(frames[0], tensor(again))
    assert read_frames(path, lambda times: [0, 0], short_side=120).shape == (2, 3, 120, 160)


@pytest.mark.parametrize("name", ["a.png", "a.mp4", "a", "a.txt", "%03d.jpg", "12:30.jpg"])
def test_names_say_nothing_about_the_content(tmp_path: Path, name: str) -> None:
    for form in ("JPEG", "PNG"):
        saved = io.BytesIO()
        Image.fromarray(photo()).save(saved, form)
        (tmp_path / name).write_bytes(saved.getvalue())
        with Image.open(saved) as image:
            assert torch.equal(read_frames(tmp_path / name)[0], tensor(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["jpg", "png", "webp", "tiff"])
def test_orientation(tmp_path: Path, orientation: int, form: str) -> None:
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    path = tmp_path / f"a.{form}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    extra = {"lossless": True} if form == "webp" else {"quality": 97} if form == "jpg" else {}
    Image.fromarray(photo()).save(path, exif=exif, **extra)
    expected = turned(photo()).transpose(2, 0, 1).astype(int)
    frames = read_frames(path)
    assert frames.shape[1:] == expected.shape
    assert np.abs(frames[0].numpy() - expected).mean() < 10


def test_sixteen_bits(tmp_path: Path) -> None:
    fine = (photo(2).astype(np.uint16) << 8) + 77
    grey = tmp_path / "grey.png"
    Image.fromarray(fine[..., 0]).save(grey)
    assert np.array_equal(
        read_frames(grey)[0], (fine[..., :1] >> 8).repeat(3, 2).transpose(2, 0, 1)
    )
    tiff = tmp_path / "grey.tiff"
    Image.fromarray(fine[..., 0]).save(tiff)
    assert torch.equal(read_frames(tiff), read_frames(grey))
    pgm = tmp_path / "grey.pgm"
    pgm.write_bytes(b"P5 640 480 65535\n" + fine[..., 0].astype(">u2").tobytes())
    assert torch.equal(read_frames(pgm), read_frames(grey))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in fine)
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    colour = tmp_path / "colour.png"
    colour.write_bytes(png(head, zlib.compress(rows)))
    assert np.array_equal(read_frames(colour)[0], (fine >> 8).transpose(2, 0, 1))


def png(head: bytes, rows: bytes) -> bytes:
    parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in parts
    )


@pytest.mark.parametrize("form", ["webp", "png", "gif", "avif"])
def test_animated_pictures_are_films(tmp_path: Path, form: str) -> None:
    pictures = [Image.fromarray(photo(k)[:120, :160]) for k in range(6)]
    path = tmp_path / f"a.{form}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=200)
    seen: list[float] = []

    def choose(times: list[float]) -> list[int]:
        seen.extend(times)
        return [5, 0, 3]

    frames = read_frames(path, choose)
    assert [round(time - seen[0], 3) for time in seen] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    for frame, number in zip(frames, (5, 0, 3), strict=True):
        errors = [
            np.abs(frame.numpy().astype(int) - np.array(p).transpose(2, 0, 1)).mean()
            for p in pictures
        ]
        assert int(np.argmin(errors)) == number
    assert torch.equal(read_frames(path)[[5, 0, 3]], frames)


@pytest.mark.parametrize("disposal", range(4))
def test_gif_of_differences(tmp_path: Path, disposal: int) -> None:
    pictures = []
    for number in range(8):
        canvas = np.full((96, 128, 3), 200, dtype=np.uint8)
        canvas[10 + number * 8 : 26 + number * 8, 20:60] = (255, 0, 0)
        pictures.append(Image.fromarray(canvas).quantize(8))
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], disposal=disposal)
    frames = read_frames(path)
    for number, picture in enumerate(pictures):
        if disposal < 3:  # for which Pillow writes the wrong differences
            assert (frames[number].float() - tensor(picture)).abs().mean() < 2
        alone = read_frames(path, lambda times, n=number: [n])
        assert torch.equal(alone[0], frames[number])


def test_pages_and_second_pictures_are_no_film(tmp_path: Path) -> None:
    first, second = (Image.fromarray(photo(k)) for k in range(2))
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=[second])
    first.save(tmp_path / "pair.mpo", save_all=True, append_images=[second])
    for name in ("pages.tiff", "pair.mpo"):
        frames = read_frames(tmp_path / name)
        assert frames.shape[0] == 1
        assert (frames[0].float() - tensor(first)).abs().mean() < 8


def test_jpeg_with_a_thumbnail_or_something_behind(tmp_path: Path) -> None:
    small, large = io.BytesIO(), io.BytesIO()
    Image.fromarray(photo(1)[:60, :80]).save(small, "JPEG")
    Image.fromarray(photo()).save(large, "JPEG", exif=b"Exif\0\0" + small.getvalue())
    path = tmp_path / "a.jpg"
    for content in (
        large.getvalue(),
        large.getvalue() + b"\0" * 99,
        large.getvalue() + b"ftypmp42",
    ):
        path.write_bytes(content)
        assert torch.equal(read_frames(path)[0], tensor(Image.open(large)))


def test_jpeg_pictures_behind_each_other_are_a_film(tmp_path: Path) -> None:
    content = b""
    for number in range(3):
        saved = io.BytesIO()
        Image.fromarray(photo(number)).save(saved, "JPEG")
        content += saved.getvalue()
    path = tmp_path / "a.mjpeg"
    path.write_bytes(content)
    frames = read_frames(path)
    assert frames.shape == (3, 3, HEIGHT, WIDTH)
    assert torch.equal(read_frames(path, lambda times: [2])[0], frames[2])


def test_turned_videos(tmp_path: Path) -> None:
    flat = tmp_path / "flat.mp4"
    for turn in (0, 90, 180, 270):
        path = flat if not turn else tmp_path / f"{turn}.mp4"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("libx264", rate=25, options={"crf": "10"})
            stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
            if turn:
                stream.set_display_rotation(turn)
            for _ in range(3):
                frame = av.VideoFrame.from_ndarray(photo()[:96, :160].copy(), format="rgb24")
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        expected = torch.rot90(read_frames(flat), turn // 90, (2, 3))
        frames = read_frames(path)
        assert frames.shape == expected.shape
        assert (frames.float() - expected).abs().mean() < 3  # x264 may encode otherwise each time


def test_what_is_no_picture_says_so(tmp_path: Path) -> None:
    saved = io.BytesIO()
    Image.fromarray(photo()).save(saved, "JPEG")
    heif = (
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x20infe\2\0\0\0\0\1\0\0grid\0" + bytes(99)
    )
    floats = io.BytesIO()
    Image.fromarray(np.ones((9, 9), dtype=np.float32)).save(floats, "TIFF")
    raw = io.BytesIO()
    Image.fromarray(photo()).save(raw, "TIFF", tiffinfo={254: 1})
    huge = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    large = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    reasons = {
        "cut.jpg": (saved.getvalue()[:20000], "truncated"),
        "head.jpg": (saved.getvalue()[:11], ""),
        "magic.jpg": (b"\xff\xd8\xff", ""),
        "tiles.heic": (heif, "tiles"),
        "floats.tiff": (floats.getvalue(), "mode F"),
        "camera.nef": (raw.getvalue(), "thumbnail"),
        "huge.png": (png(huge, b""), "pixels"),
        "large.png": (png(large, b""), "144000000|12000 x 12000 pixels"),
        "huge.ppm": (b"P6 100000 100000 255\n", "pixels"),
        "broken.png": (b"\x89PNG\r\n\x1a\n" + bytes(99), ""),
    }
    for name, (content, reason) in reasons.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UnusableVideoError, match=f"(?s){name}: .*({reason})") as error:
            read_frames(path)
        assert "\n" not in str(error.value)


def test_broken_exif_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(photo()).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert read_frames(path).shape == (1, 3, HEIGHT, WIDTH)
