"""A folder of images with twelve kinds of readable files, and eight kinds of unreadable ones if asked for."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class Made:
    """The files written: `good` and `broken` map a path to its kind."""

    root: Path
    class_names: tuple[str, ...]
    good: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


def picture(c: int, number: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    """An RGB image of class `c`: stripes with the direction and colour of the class, and noise."""
    rng = np.random.default_rng([c, number])
    y, x = np.mgrid[: size[0], : size[1]]
    angle = np.pi * c / 5 + rng.normal(0, 0.05)
    wave = 0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) / 3 + rng.uniform(0, 6))
    colour = np.array([[230, 60, 40], [40, 90, 230], [60, 200, 70], [220, 200, 40]][c % 4])
    pixels = wave[..., None] * colour + rng.normal(0, 12, (*size, 3)) + 15
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _orientation(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def _palette(image: Image.Image, path: Path) -> None:
    image.quantize(32).save(path, transparency=0)


def _alpha(mode: str) -> Callable[[Image.Image, Path], None]:
    def save(image: Image.Image, path: Path) -> None:
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)

    return save


def _sixteen(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)


def _animation(image: Image.Image, path: Path) -> None:
    image.save(path, save_all=True, append_images=[Image.new("RGB", image.size, "black")])


GOOD: dict[str, Callable[[Image.Image, Path], None]] = {
    "plain.jpg": lambda image, path: image.save(path, quality=92),
    "orientation.jpg": _orientation,
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path),
    "grey.JPEG": lambda image, path: image.convert("L").save(path),
    "alpha.png": _alpha("RGB"),
    "grey_alpha.png": _alpha("L"),
    "palette.png": _palette,
    "sixteen.png": _sixteen,
    "bits.png": lambda image, path: image.convert("1").save(path),
    "animated.gif": _animation,
    "animated.webp": _animation,
    "sixteen.tif": _sixteen,
}


def png_header(width: int, height: int) -> bytes:
    """A small PNG whose header gives another size."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return content


def _cut(image: Image.Image, path: Path) -> None:
    image.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _floats(image: Image.Image, path: Path) -> None:
    Image.fromarray(np.linspace(-4000, 4000, 48 * 64, dtype=np.float32).reshape(48, 64)).save(path)


# Each with a word that the reason must contain.
BROKEN: dict[str, tuple[str, Callable[[Image.Image, Path], object]]] = {
    "empty.jpg": ("empty", lambda image, path: path.write_bytes(b"")),
    "cut.jpg": ("truncated", _cut),
    "cut.png": ("truncated", _cut),
    "text.jpg": ("not an image", lambda image, path: path.write_text("this is no picture")),
    "bomb.png": ("pixels", lambda image, path: path.write_bytes(png_header(60000, 60000))),
    "nothing.png": ("not an image", lambda image, path: path.write_bytes(png_header(0, 10))),
    "gone.jpg": ("does not exist", lambda image, path: path.symlink_to(path.with_name("nowhere.jpg"))),
    "floats.tif": ("floats", _floats),
}


def make_folder(
    path: Path, classes: int = 2, per_class: int = 12, *, broken: bool = True, layout: tuple[str, ...] = ()
) -> Made:
    """Write `classes` class folders of `per_class` good images, of the twelve kinds in turn, and the broken ones.

    layout: names such as ("train", "test") to write the class folders below each of; broken files go to the first only.
    """
    names = tuple(f"class{c}" for c in range(classes))
    made = Made(path, names)
    kinds, broken_kinds = list(GOOD), list(BROKEN)
    for part, base in enumerate([path / name for name in layout] or [path]):
        for c, name in enumerate(names):
            folder = base / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                kind = kinds[number % len(kinds)]
                file = folder / f"{number:03d}_{kind}"
                GOOD[kind](picture(c, 1000 * part + number), file)
                made.good[str(file)] = kind
        if broken and part == 0:
            for number, kind in enumerate(broken_kinds):
                file = base / names[number % classes] / kind
                BROKEN[kind][1](picture(0, 999), file)
                made.broken[str(file)] = kind
    return made
