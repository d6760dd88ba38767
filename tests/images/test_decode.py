import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_image

from data.make_folder import BROKEN, GOOD, picture, png_header
from vitrail.images.convert import quiet_pillow, to_channels
from vitrail.images.decode import BadImage, decode, image_extensions, read_header


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def close(image: Image.Image, expected: Image.Image, most: float) -> None:
    assert image.mode == expected.mode
    assert image.size == expected.size
    assert np.abs(array(image) - array(expected)).mean() < most


@pytest.mark.parametrize("kind", GOOD)
def test_good_kinds(kind, tmp_path):
    path, image = tmp_path / kind, picture(1, 0)
    GOOD[kind](image, path)
    grey = image.convert("L")
    if "grey" in kind or "sixteen" in kind:
        expected = grey.convert("RGB")
    elif kind == "bits.png":
        expected = image.convert("1").convert("RGB")
    else:
        expected = image
    if "alpha" in kind:
        share = array(Image.linear_gradient("L").resize(image.size))[..., None] / 255
        white = array(expected) * share + 255 * (1 - share)
        expected = Image.fromarray(white.round().astype(np.uint8))
    loss = {".jpg": 12, ".JPEG": 12, ".gif": 12, ".webp": 14}.get(path.suffix, 12 if "palette" in kind else 0.6)
    if kind != "palette.png":
        close(decode(path), expected, loss)
        close(decode(path, channels=1), expected.convert("L"), loss)
    header = read_header(path)
    assert (header.height, header.width) == image.size[::-1]
    assert not header.may_fail


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_kinds(kind, tmp_path):
    word, make = BROKEN[kind]
    path = tmp_path / kind
    make(picture(0, 0), path)
    with pytest.raises(BadImage, match=word) as bad:
        decode(path)
    assert "\n" not in bad.value.reason
    assert len(bad.value.reason) < 220


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(turn, kind):
    # Pillow's own transpose is the oracle for pixels, and its size for the header.
    corner = np.full((24, 40, 3), 200, dtype=np.uint8)
    corner[:8, :16] = [250, 20, 20]
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    content = encoded(Image.fromarray(corner), kind, exif=exif, **options)
    image = decode(content)
    back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[turn](corner)
    assert np.abs(array(image) - back).mean() < 3
    assert array(decode(image)).tolist() == array(image).tolist()  # not turned a second time


def test_header_says_the_turned_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        Image.new("RGB", (40, 24)).save(tmp_path / name, exif=exif)
        header = read_header(tmp_path / name)
        assert (header.height, header.width) == decode(tmp_path / name).size[::-1] == (40, 24), name


def test_16_bits_are_scaled():
    values = np.array([[0, 128, 129, 257, 32896, 65535]], dtype=np.uint16)
    expected = [[0, 0, 1, 1, 128, 255]]
    for kind in ("PNG", "TIFF"):
        assert array(decode(encoded(Image.fromarray(values), kind), channels=1)).tolist() == expected, kind
    big = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    assert array(decode(big, channels=1)).tolist() == expected
    assert array(decode(Image.fromarray(values.astype(np.int32)), channels=1)).tolist() == expected


def test_16_bit_pnm_and_rgb_png():
    values = np.array([[0, 257, 65535]], dtype=">u2")
    assert array(decode(b"P5 3 1 65535\n" + values.tobytes(), channels=1)).tolist() == [[0, 1, 255]]
    row = b"\0" + np.array([65535, 32896, 257], dtype=">u2").tobytes()
    chunks = b"\x89PNG\r\n\x1a\n"
    for name, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(row)),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    assert array(decode(chunks)).tolist() == [[[255, 128, 1]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 128.4, 255.0], [0, 128, 255]),
        ([0.0, 300.0], None),
        ([-1.0, 1.0], None),
        ([float("nan"), 1.0], None),
    ],
)
def test_floats(values, expected):
    content = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    if expected is None:
        with pytest.raises(BadImage):
            decode(content)
    else:
        assert array(decode(content, channels=1)).tolist() == [expected]


def test_wide_integers_are_refused():
    with pytest.raises(BadImage, match="integers"):
        decode(Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (250, 240, 10), (0, 0, 0), (255, 255, 255)])
@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "P", "PA"])
def test_other_colour_spaces(mode, colour):
    image = Image.new("RGB", (16, 16), colour)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    elif mode == "RGBa":
        image = image.convert("RGBA").convert("RGBa")
    elif mode == "PA":
        image = image.quantize().convert("PA")
    elif mode == "P":
        image = image.quantize()
    else:
        image = image.convert(mode)
    got = array(decode(image))
    assert np.abs(got - colour).max() <= (24 if mode == "LAB" else 4)
    grey = array(decode(image, channels=1))
    assert np.abs(grey - array(Image.new("RGB", (1, 1), colour).convert("L"))[0, 0]).max() <= (
        12 if mode == "LAB" else 4
    )


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)])
def test_adobe_cmyk_jpeg_is_not_negative(colour):
    content = encoded(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in content
    assert np.abs(array(decode(content)) - colour).max() < 12


def test_transparency_lies_on_white():
    half = Image.new("RGBA", (4, 4), (0, 100, 200, 128))
    expected = [round(c * 128 / 255 + 255 * 127 / 255) for c in (0, 100, 200)]
    assert np.abs(array(decode(encoded(half, "PNG")))[0, 0] - expected).max() <= 1
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    for transparency in (3, bytes([255, 255, 255, 0])):  # one index, or an alpha for each
        assert array(decode(encoded(palette, "PNG", transparency=transparency))).min() == 255
    assert array(decode(encoded(palette, "GIF", transparency=3))).min() == 255
    assert array(decode(encoded(palette, "PNG")))[0, 0].tolist() == [0, 0, 255]
    keyed = Image.new("RGB", (4, 4), (9, 8, 7))
    assert array(decode(encoded(keyed, "PNG", transparency=(9, 8, 7)))).min() == 255
    keyed.info["transparency"] = (65535, 0, 0)  # of a 16-bit image that Pillow reads as 8
    assert array(decode(keyed))[0, 0].tolist() == [9, 8, 7]
    grey = Image.new("L", (4, 4), 7)
    assert array(decode(encoded(grey, "PNG", transparency=7), channels=1)).min() == 255


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (20, 12), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(array(decode(content)) - (255, 0, 0)).max() < 8


def test_draft_keeps_what_is_needed():
    photo = Image.fromarray(load_sample_image("china.jpg"))
    content = encoded(photo, "JPEG", quality=95)
    assert decode(content).size == (640, 427)
    for need in ((100, 150), (107, 160), (108, 160), (213, 320), (214, 321), (1, 1), (500, 700)):
        small = decode(content, at_least=need)
        assert small.height >= min(need[0], 427)
        assert small.width >= min(need[1], 640)
    half = decode(content, at_least=(200, 300))
    assert half.size == (320, 214)
    close(half, photo.resize(half.size, Image.Resampling.BOX), 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = encoded(photo, "JPEG", exif=exif)
    seen = []
    turned = decode(sideways, at_least=lambda height, width: seen.append((height, width)) or (300, 200))
    assert seen == [(640, 427)]
    assert turned.size == (214, 320)


def test_limits():
    with pytest.raises(BadImage, match="pixels"):
        decode(png_header(20000, 10000))
    with pytest.raises(BadImage, match="empty"):
        decode(b"")
    with pytest.raises(BadImage, match="no pixels"):
        decode(Image.new("RGB", (0, 4)))
    with pytest.raises(ValueError, match="channels"):
        to_channels(Image.new("RGB", (2, 2)), 4)


def test_files_that_are_none(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(BadImage, match="folder"):
        decode(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    with pytest.raises(BadImage, match="regular"):
        decode(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("name", ["plain.jpg", "alpha.png", "animated.gif", "animated.webp", "sixteen.tif"])
def test_damage_is_bad_image_or_an_image(name, tmp_path):
    """Whatever bytes are flipped, the only exception is BadImage."""
    path = tmp_path / name
    GOOD[name](picture(0, 0), path)
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(60):
        hurt = content.copy()
        hurt[rng.integers(0, len(hurt), size=rng.integers(1, 8))] = rng.integers(0, 256)
        try:
            mode = decode(hurt[: rng.integers(1, len(hurt) + 1)].tobytes()).mode
        except BadImage:
            bad += 1
        else:
            assert mode == "RGB"
    assert bad > 10


def test_quiet_leaves_the_filters_as_they_were():
    before = list(warnings.filters)
    with pytest.raises(UserWarning, match="mine"), quiet_pillow():
        warnings.warn("mine", UserWarning, stacklevel=1)  # only Pillow's are silenced
    big = png_header(10000, 10000)  # Pillow warns above 89 million pixels
    problems = []

    def work():
        try:
            decode(big)
        except BadImage as error:
            problems.append(error.reason)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problems) == 8
    assert not any("Warning" in problem for problem in problems)
    assert warnings.filters == before


def test_extensions():
    ends = image_extensions()
    assert {".jpg", ".jpeg", ".png", ".gif", ".webp", ".tif", ".tiff", ".bmp"} <= ends
    assert not ends & {".txt", ".pdf", ".eps", ".mpg", ".db", ".json", ""}


@pytest.mark.parametrize(("brand", "heic"), [(b"heic", True), (b"mif1", True), (b"isom", False)])
def test_heic_is_named(brand, heic, tmp_path):
    assert {".heic", ".heif"} <= image_extensions()  # so that they are listed as skipped
    path = tmp_path / "a.jpg"  # as phones and people rename them
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    for read in (decode, read_header):
        with pytest.raises(BadImage) as bad:
            read(path)
        assert ("is HEIC" in bad.value.reason) == heic


def test_truncated_is_said_once():
    content = encoded(picture(1, 0), "JPEG")
    with pytest.raises(BadImage) as bad:
        decode(content[: len(content) // 2])
    assert bad.value.reason.startswith("is truncated (")
    assert bad.value.reason.count("truncated") == 1
