"""Bounds on memory and time: thin images, large ones, slow ones, and images decoded by several threads at once."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from data.make_folder import png_header
from vitrail.data.augment.crop import CROP_DRAWS, random_crop
from vitrail.data.dataset import FileSplit
from vitrail.images import limits, preprocess
from vitrail.images.convert import to_channels
from vitrail.images.decode import BadImage, decode, one_image
from vitrail.images.preprocess import CROP_MODES, INTERPOLATIONS, Preprocess


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 4600), (1, 20_000), (20_000, 1), (1, 1_000_000), (1_000_000, 1), (3, 999_983)])
@pytest.mark.parametrize("mode", CROP_MODES)
def test_thin_images_take_little_memory_and_time(size: tuple[int, int], mode: str) -> None:
    """In a process whose memory is limited: resizing all of a 1 x 20,000 image took 4.5 GB."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    start = time.thread_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000, before[1]))
    try:
        image = Image.new("RGB", size, (10, 200, 30))
        pixels = Preprocess(size=(224, 224), crop_mode=mode, mean=(0.0, 0.0, 0.0)).crop(decode(encoded(image)))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.thread_time() - start < 3
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3).tolist()}
    assert (10, 200, 30) in colours
    assert colours <= {(10, 200, 30), (0, 0, 0)}  # black: the padding of "border"


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(64, 64), (32, 80), (80, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_resizing_the_part_that_is_seen_is_resizing_all_of_it(
    interpolation: str, size: tuple[int, int], crop_pct: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is Pillow's resize of the whole image."""
    photo = Image.fromarray(skimage.data.astronaut()).resize((400, 400), Image.Resampling.BICUBIC)
    settings = Preprocess(size=size, interpolation=interpolation, crop_pct=crop_pct)
    for shape in ((400, 400), (400, 37), (37, 400), (400, 5), (7, 400)):
        image = photo.crop((0, 0, *shape))
        whole = settings.crop(image).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "_LARGE", 0)
            seen = settings.crop(image).astype(int)
        gap = np.abs(seen - whole)
        # Nearest and box choose between two neighbours where a coordinate is rounded the other way.
        assert np.quantile(gap, 0.9) <= (1 if interpolation not in ("nearest", "box") else 12), shape
        assert gap.mean() < 2.5, shape


def test_conversion_in_strips_is_conversion_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8))
    wide = Image.fromarray(rng.integers(0, 65536, (37, 23), dtype=np.uint16))
    floats = Image.fromarray(rng.random((37, 23), dtype=np.float32))
    images = [rgba, rgba.convert("LA"), rgba.convert("PA"), wide, wide.convert("I"), floats]
    at_once = [np.asarray(to_channels(image.copy())) for image in images]
    monkeypatch.setattr("vitrail.images.convert._STRIP", 50)
    for image, expected in zip(images, at_once, strict=True):
        np.testing.assert_array_equal(np.asarray(to_channels(image.copy())), expected)
    np.testing.assert_array_equal(at_once[3][..., 0], np.rint(np.asarray(wide) / 257))
    white = np.asarray(rgba, dtype=float)
    share = white[..., 3:] / 255
    assert np.abs(at_once[0] - (white[..., :3] * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize(
    ("mode", "kind", "size", "word"),
    [
        ("RGB", "PNG", (13_000, 13_000), "memory"),
        ("LA", "PNG", (9_000, 9_000), "memory"),
        ("I;16", "TIFF", (9_000, 9_000), "memory"),
        ("F", "TIFF", (6_000, 6_000), "memory"),
        ("RGB", "TIFF", (7_000, 7_000), "memory"),
        ("RGBA", "WEBP", (5_000, 5_000), "memory"),
        ("RGB", "QOI", (2_000, 2_000), "QOI"),
        ("L", "PNG", (4_200_000, 3), "side"),
    ],
)
def test_images_that_would_take_too_much_memory_are_refused_before_they_are_decoded(
    mode: str, kind: str, size: tuple[int, int], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of one pixel that says it has this size."""
    Image.init()  # registers the decoders that are written in Python
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    image = Image.new(mode, (1, 1)) if mode != "I;16" else Image.fromarray(np.zeros((1, 1), np.uint16))
    image.format = kind
    monkeypatch.setattr(Image.Image, "size", size)
    monkeypatch.setattr(Image.Image, "width", size[0])
    monkeypatch.setattr(Image.Image, "height", size[1])
    if kind == "QOI":
        image.tile = [("qoi", (0, 0, *size), 0, ())]  # type: ignore[attr-defined]
    check = limits.check_size if word == "side" else lambda *size: limits.decoding_bytes(image, size)
    with pytest.raises(BadImage, match=word) as bad:
        check(*size)
    assert "\n" not in bad.value.reason


def test_a_photograph_of_fifty_megapixels_is_not_refused() -> None:
    image = decode(encoded(Image.new("RGB", (8688, 5792), (1, 2, 3)), "JPEG"))
    assert image.size == (8688, 5792)


def with_scans(content: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[start:end] * count + content[end:]


def test_a_progressive_jpeg_of_many_scans_is_refused() -> None:
    content = encoded(Image.new("RGB", (4000, 4000), (120, 30, 90)), "JPEG", progressive=True)
    assert decode(content).size == (4000, 4000)
    start = time.thread_time()
    with pytest.raises(BadImage, match="110 scans"):
        decode(with_scans(content, 100))
    assert time.thread_time() - start < 0.3
    small = encoded(Image.new("RGB", (40, 40)), "JPEG", progressive=True)
    assert decode(with_scans(small, 100)).size == (40, 40)


def test_a_decoder_that_reads_on_and_on_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)))
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    (tmp_path / "a.png").write_bytes(content)
    for source in (content, tmp_path / "a.png"):
        with pytest.raises(BadImage, match="takes more than"):
            decode(source)


def test_threads_share_a_bound_on_the_bytes_in_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 threads decode images of 4 MB each, and at most 10 MB at once; each waits until the others are cropped."""
    content = encoded(Image.new("RGB", (1000, 1000)))
    memory = limits._Memory(10_000_000)
    monkeypatch.setattr(limits, "_memory", memory)
    lock, now, most = threading.Lock(), [0], [0]

    def work() -> None:
        for _ in range(3):
            with one_image():
                image = decode(content)
                with lock:
                    now[0] += 1
                    most[0] = max(most[0], now[0])
                time.sleep(0.01)
                with lock:
                    now[0] -= 1
                del image

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] == 2
    assert memory._free == 10_000_000


@pytest.mark.parametrize(("free", "together"), [(100, False), (1 << 40, True), (None, True)])
def test_where_memory_is_scarce_a_model_computes_while_no_image_is_decoded(
    free: int | None, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "free_host_memory", lambda: free)
    limits._memory_is_scarce.cache_clear()
    monkeypatch.setattr(limits, "_memory", limits._Memory(limits.DECODING_BYTES))
    decoding, overlaps, stop = [0], [0], threading.Event()
    lock = threading.Lock()

    def decode_images() -> None:
        while not stop.is_set():
            with limits.holding(), limits.reserved(1000):
                with lock:
                    decoding[0] += 1
                time.sleep(0.001)
                with lock:
                    decoding[0] -= 1

    @limits.computing()
    def compute() -> None:
        overlaps[0] += decoding[0]
        time.sleep(0.002)
        overlaps[0] += decoding[0]

    threads = [threading.Thread(target=decode_images) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):  # each gets its turn although images are always being decoded
        compute()
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert (overlaps[0] > 0) == together
    assert limits._memory._free == limits.DECODING_BYTES


def test_who_is_interrupted_while_waiting_for_memory_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = limits._Memory(10)
    memory.take(10)

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memory._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.take(1)
    memory.give(10)
    other = threading.Thread(target=memory.take, args=(10,), daemon=True)
    other.start()
    other.join(timeout=60)
    assert memory._free == 0


def test_memory_that_does_not_suffice_is_the_fault_of_one_image() -> None:
    """In a process with little memory: the large image is refused, and the next one is decoded."""
    code = f"""
import io, resource, sys
from pathlib import Path
from PIL import Image
from vitrail.images.decode import BadImage, decode, one_image
from vitrail.images.preprocess import Preprocess
buffer = io.BytesIO()
Image.new("L", (9000, 9000)).save(buffer, "PNG")
small = {png_header(1, 1)!r}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
for content in (buffer.getvalue(), small):
    try:
        with one_image():
            print(Preprocess(size=(8, 8)).crop(decode(content)).shape)
    except BadImage as bad:
        print(bad.reason)
try:
    with one_image():
        raise MemoryError
except BadImage as bad:
    print(bad.reason)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["does not fit in memory", "(8, 8, 3)", "does not fit in memory"], done.stderr


def test_random_crops_of_thin_images(tmp_path: Path) -> None:
    Image.new("RGB", (1, 300_000), (9, 8, 7)).save(tmp_path / "a.png")
    split = FileSplit([str(tmp_path / "a.png")], np.zeros(1, dtype=np.int64))
    draw = np.random.default_rng(0).random(CROP_DRAWS)
    pixels = random_crop(split, 0, Preprocess(size=(224, 224)), (0.08, 1.0), (3 / 4, 4 / 3), draw)
    assert (pixels == (9, 8, 7)).all()
