"""Thousands of damaged image files from a seed: small images of every format that Pillow writes, each changed in many
ways, and planted ones that would take much memory or time."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from PIL import Image

Random = np.random.Generator
_PHOTOS = 3  # images that are written in each format
_SIDE = (40, 56)  # height and width of the images that are changed


def _photo(rng: Random) -> Image.Image:
    """A smooth RGB image with some noise."""
    height, width = _SIDE
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(2, 12) + rng.uniform(0, 6)) * np.cos(y / rng.uniform(2, 12)) for _ in range(3)]
    pixels = 128 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _turned(image: Image.Image) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    return {"exif": exif}


def _alpha(image: Image.Image, mode: str = "RGBA") -> Image.Image:
    image = image.convert(mode.replace("A", "") or "RGB").convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def _frames(image: Image.Image) -> dict[str, object]:
    return {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)], "duration": 10}


def _sixteen(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def _floats(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)


def _plain_ppm(image: Image.Image) -> bytes:
    values = " ".join(map(str, np.asarray(image).ravel().tolist()))
    return f"P3\n{image.width} {image.height}\n255\n{values}\n".encode()


# By file name: how an image is written in a format.
FORMATS: dict[str, Callable[[Image.Image], bytes]] = {
    "baseline.jpg": lambda i: _save(i, "JPEG", quality=80),
    "progressive.jpg": lambda i: _save(i, "JPEG", progressive=True),
    "turned.jpg": lambda i: _save(i, "JPEG", **_turned(i)),
    "grey.jpg": lambda i: _save(i.convert("L"), "JPEG"),
    "cmyk.jpg": lambda i: _save(i.convert("CMYK"), "JPEG"),
    "mpo.jpg": lambda i: _save(i, "MPO", save_all=True, append_images=[i.rotate(90)]),
    "rgb.png": lambda i: _save(i, "PNG"),
    "alpha.png": lambda i: _save(_alpha(i), "PNG"),
    "grey_alpha.png": lambda i: _save(_alpha(i, "LA"), "PNG"),
    "palette.png": lambda i: _save(i.quantize(32), "PNG", transparency=3),
    "bits.png": lambda i: _save(i.convert("1"), "PNG"),
    "sixteen.png": lambda i: _save(_sixteen(i), "PNG"),
    "turned.png": lambda i: _save(i, "PNG", **_turned(i)),
    "animated.png": lambda i: _save(i, "PNG", **_frames(i)),
    "plain.gif": lambda i: _save(i.quantize(64), "GIF"),
    "animated.gif": lambda i: _save(i, "GIF", **_frames(i)),
    "lossy.webp": lambda i: _save(i, "WEBP", quality=70),
    "lossless.webp": lambda i: _save(_alpha(i), "WEBP", lossless=True),
    "animated.webp": lambda i: _save(i, "WEBP", **_frames(i)),
    "plain.avif": lambda i: _save(i, "AVIF", speed=9),
    "raw.tif": lambda i: _save(i, "TIFF"),
    "deflate.tif": lambda i: _save(i, "TIFF", compression="tiff_deflate"),
    "lzw.tif": lambda i: _save(_alpha(i), "TIFF", compression="tiff_lzw"),
    "jpeg.tif": lambda i: _save(i, "TIFF", compression="jpeg"),
    "packbits.tif": lambda i: _save(i.quantize(16), "TIFF", compression="packbits"),
    "fax.tif": lambda i: _save(i.convert("1"), "TIFF", compression="group4"),
    "sixteen.tif": lambda i: _save(_sixteen(i), "TIFF"),
    "floats.tif": lambda i: _save(_floats(i), "TIFF"),
    "lossy.jp2": lambda i: _save(i, "JPEG2000", quality_mode="rates", quality_layers=[20]),
    "lossless.jp2": lambda i: _save(i, "JPEG2000"),
    "rgb.bmp": lambda i: _save(i, "BMP"),
    "palette.bmp": lambda i: _save(i.quantize(16), "BMP"),
    "icon.ico": lambda i: _save(i, "ICO", sizes=[(32, 32), (16, 16)]),
    "icon.icns": lambda i: _save(i.resize((64, 64)), "ICNS"),
    "rgb.ppm": lambda i: _save(i, "PPM"),
    "grey.pgm": lambda i: _save(_sixteen(i), "PPM"),
    "plain.ppm": _plain_ppm,
    "rle.tga": lambda i: _save(_alpha(i), "TGA", compression="tga_rle"),
    "raw.tga": lambda i: _save(i, "TGA"),
    "rgb.pcx": lambda i: _save(i, "PCX"),
    "rgb.sgi": lambda i: _save(i, "SGI"),
    "rgb.qoi": lambda i: _save(i, "QOI"),
    "rgb.dds": lambda i: _save(i, "DDS"),
    "bits.xbm": lambda i: _save(i.convert("1"), "XBM"),
    "bits.msp": lambda i: _save(i.convert("1"), "MSP"),
    "palette.blp": lambda i: _save(i.quantize(256), "BLP"),
}


# --- changes of a file's content


def _cut(data: bytearray, rng: Random) -> bytearray:
    return data[: int(rng.integers(0, len(data)))]


def _flip_bits(data: bytearray, rng: Random) -> bytearray:
    for position in rng.integers(0, len(data), int(rng.integers(1, 12))):
        data[position] ^= 1 << int(rng.integers(0, 8))
    return data


def _change_header(data: bytearray, rng: Random) -> bytearray:
    """Where sizes, offsets and counts stand: an integer of 1, 2 or 4 bytes becomes 0, large, or anything."""
    size, order = int(rng.choice([1, 2, 4])), str(rng.choice(["little", "big"]))
    top = (1 << 8 * size) - 1
    value = int(rng.choice([0, 1, top, top // 2, int(rng.integers(0, top + 1)), min(top, 60_000), min(top, 20_000)]))
    position = int(rng.integers(0, max(1, min(len(data) - size, 96))))
    data[position : position + size] = value.to_bytes(size, order)  # type: ignore[arg-type]
    return data


def _change_a_tail(data: bytearray, rng: Random) -> bytearray:
    start = int(rng.integers(max(0, len(data) - 200), len(data)))
    data[start : start + 8] = rng.bytes(8)
    return data


def _overwrite(data: bytearray, rng: Random) -> bytearray:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 1 + len(data) // 3))
    data[start : start + length] = bytes([int(rng.choice([0, 255]))]) * len(data[start : start + length])
    return data


def _delete(data: bytearray, rng: Random) -> bytearray:
    start = int(rng.integers(0, len(data)))
    del data[start : start + int(rng.integers(1, 64))]
    return data


def _insert(data: bytearray, rng: Random) -> bytearray:
    start = int(rng.integers(0, len(data)))
    data[start:start] = rng.bytes(int(rng.integers(1, 64)))
    return data


def _repeat(data: bytearray, rng: Random) -> bytearray:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(8, 400))
    data[start:start] = data[start : start + length] * int(rng.integers(1, 30))
    return data


def _shuffle(data: bytearray, rng: Random) -> bytearray:
    parts = np.array_split(np.frombuffer(bytes(data), np.uint8), 8)
    rng.shuffle(parts)  # type: ignore[arg-type]
    return bytearray(np.concatenate(parts).tobytes())


CHANGES = (
    _cut,
    _flip_bits,
    _flip_bits,
    _change_header,
    _change_header,
    _change_header,
    _change_a_tail,
    _overwrite,
    _delete,
    _insert,
    _repeat,
    _shuffle,
)


def _checksums(data: bytes) -> bytes:
    """A PNG whose chunks have right checksums again, so that the changes get past the first check."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunk = data[at + 4 : at + 8 + length]
        if len(chunk) < 4 + length or at + 12 + length > len(data):
            break
        out += data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + length
    return bytes(out) + data[at:]


# --- planted images


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG of any size in its header, whose pixels are all 0, or `rows`."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    stride = 1 + (width * channels * depth + 7) // 8
    compress = zlib.compressobj(1)
    body = b""
    if rows is None:
        line = bytes(stride) * max(1, min(height, (1 << 22) // stride))
        left = stride * height
        while left > 0:
            body += compress.compress(line[:left])
            left -= len(line)
        body += compress.flush()
    else:
        body = zlib.compress(rows)
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *([(b"PLTE", bytes(3))] if colour == 3 else []),
        (b"IDAT", body),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return content


def scans(width: int, height: int, count: int) -> bytes:
    """A progressive JPEG with `count` more scans."""
    content = _save(Image.new("RGB", (width, height), (120, 30, 90)), "JPEG", progressive=True)
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[start:end] * count + content[end:]


def planted() -> Iterator[tuple[str, bytes]]:
    """Thin images, bombs, many scans, and large images of kinds whose conversion takes much memory."""
    for width, height in ((1, 4600), (1, 20_000), (20_000, 1), (1, 1_000_000), (1_000_000, 1), (2, 3_000_000)):
        yield f"thin{width}x{height}.png", png(width, height)
    for width, height in ((60_000, 60_000), (13_000, 13_000), (12_000, 11_000), (1, 100_000_000)):
        yield f"bomb{width}x{height}.png", png(width, height, rows=bytes(1000))
    yield "large.png", png(9_000, 8_000)
    yield "large_grey.png", png(9_000, 9_000, colour=0)
    yield "large_grey_alpha.png", png(9_000, 9_000, colour=4)
    yield "large_alpha.png", png(8_000, 8_000, colour=6)
    yield "large_sixteen.png", png(8_000, 8_000, depth=16, colour=0)
    yield "large_palette.png", png(10_000, 9_000, colour=3)
    yield "large_bits.png", png(10_000, 10_000, depth=1, colour=0)
    yield (
        "large_sixteen.tif",
        _save(Image.fromarray(np.zeros((6_000, 6_000), np.uint16)), "TIFF", compression="tiff_lzw"),
    )
    yield (
        "large_floats.tif",
        _save(Image.fromarray(np.zeros((6_000, 5_000), np.float32)), "TIFF", compression="tiff_deflate"),
    )
    yield "large.webp", _save(Image.new("RGB", (5_000, 5_000), "blue"), "WEBP", quality=10, method=0)
    yield "large.qoi", _save(Image.new("RGB", (1_900, 1_000), "blue"), "QOI")
    yield "large_plain.ppm", b"P3 1400 1400 255\n" + b"7 " * (3 * 1400 * 1400)
    for side, count in ((1_000, 100), (4_000, 100), (6_000, 30), (500, 2_000)):
        yield f"scans{side}x{count}.jpg", scans(side, side, count)


def mutations(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """The planted images, then changed ones, `count` in all; each (file name, content). The same for a seed."""
    number = 0
    for name, content in planted():
        if number == count:
            return
        yield f"{number:05d}_{name}", content
        number += 1
    rng = np.random.default_rng(seed)
    originals = []
    for _ in range(_PHOTOS):
        photo = _photo(rng)
        for name, write in FORMATS.items():
            with suppress(KeyError, OSError):  # an older Pillow cannot write all of them
                originals.append((name, write(photo)))
    while number < count:
        name, content = originals[number % len(originals)]
        data = bytearray(content)
        for _ in range(int(rng.integers(1, 4))):
            change = CHANGES[int(rng.integers(0, len(CHANGES)))]
            data = change(data, rng) or bytearray(b"\0")
        content = bytes(data)
        yield f"{number:05d}_{name}", _checksums(content) if rng.random() < 0.7 else content
        number += 1
