import functools
import io
import math
import subprocess
import sys

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from vitrail.errors import ConfigError
from vitrail.images.convert import BadImage
from vitrail.images.preprocess import CROP_MODES, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, Preprocess
from vitrail.weights.published import PUBLISHED


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: waking threads costs more than it saves
    yield
    torch.set_num_threads(threads)


@functools.cache
def photographs() -> dict[str, Image.Image]:
    """Real photographs, long and wide, tiny and large, each read from a JPEG or a PNG file."""
    photos = {
        "china": load_sample_image("china.jpg"),
        "flower": load_sample_image("flower.jpg"),
        "astronaut": skimage.data.astronaut(),
        "coffee": skimage.data.coffee(),
        "chelsea": skimage.data.chelsea(),
    }
    images = {name: Image.fromarray(np.ascontiguousarray(pixels)) for name, pixels in photos.items()}
    images["wide"] = images["china"].crop((0, 100, 640, 223))
    images["tall"] = images["coffee"].crop((200, 0, 301, 400))
    images["very wide"] = images["flower"].crop((0, 200, 640, 231))
    images["tiny"] = images["chelsea"].resize((31, 23))
    images["odd"] = images["flower"].crop((3, 5, 260, 262))
    images["large"] = images["astronaut"].resize((1024, 1021), Image.Resampling.BICUBIC)
    forms = [{"format": "JPEG", "quality": 85}, {"format": "PNG"}]
    return {name: as_file(image, **forms[k % 2]) for k, (name, image) in enumerate(images.items())}


def as_file(image: Image.Image, **form) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, **form)
    read = Image.open(buffer)
    read.load()
    assert (read.format, read.mode, read.size) == (form["format"], "RGB", image.size)
    return read


# Settings beyond those in use: other shapes, modes and interpolations.
MORE = [
    ((224, 224), "bilinear", 0.965, "center"),
    ((224, 224), "bicubic", 1.0, "squash"),
    ((224, 224), "lanczos", 0.95, "squash"),
    ((224, 224), "bicubic", 1.0, "border"),
    ((256, 256), "bilinear", 0.9, "border"),
    ((192, 320), "bicubic", 0.9, "center"),
    ((320, 192), "bilinear", 1.0, "center"),
    ((97, 161), "bicubic", 0.77, "squash"),
    ((97, 161), "bicubic", 0.9, "border"),
    ((224, 224), "nearest", 0.875, "center"),
    ((64, 64), "box", 0.9, "center"),
    ((64, 64), "hamming", 1.0, "border"),
    ((32, 32), "bicubic", 0.875, "center"),
]


def published(of_torchvision: bool) -> list[tuple[tuple[int, int], str, float, str]]:
    """Every setting in the table of published weights."""
    records = [r for rows in PUBLISHED.values() for r in rows if r.tag.startswith("torchvision") == of_torchvision]
    return sorted({(p.size, p.interpolation, p.crop_pct, p.crop_mode) for p in (r.preprocess for r in records)})


SETTINGS = [*published(of_torchvision=False), *MORE]
# torchvision's presets: crop, resize, interpolation
PRESETS = [
    (224, 256, "bilinear"),
    (224, 232, "bilinear"),
    (224, 236, "bilinear"),
    (224, 242, "bilinear"),
    (224, 224, "bicubic"),
    (224, 232, "bicubic"),
    (224, 238, "bicubic"),
    (224, 246, "bicubic"),
    (384, 384, "bicubic"),
]


def test_there_are_at_least_300_combinations_and_all_that_is_in_use_is_among_them():
    assert len(photographs()) * (len(SETTINGS) + len(PRESETS)) >= 300
    assert {mode for *_, mode in SETTINGS} == set(CROP_MODES)
    assert {interpolation for _, interpolation, *_ in SETTINGS} == set(INTERPOLATIONS)
    sides = [(image.format, *image.size) for image in photographs().values()]
    assert {form for form, *_ in sides} == {"JPEG", "PNG"}
    assert max(w / h for _, w, h in sides) > 20
    assert max(h / w for _, w, h in sides) > 3.9
    assert min(w * h for _, w, h in sides) < 1000
    assert max(w * h for _, w, h in sides) > 1e6


@pytest.mark.parametrize(("size", "interpolation", "crop_pct", "crop_mode"), SETTINGS)
def test_equals_timm(size, interpolation, crop_pct, crop_mode):
    mean, std = ((0.5, 0.4, 0.6), (0.5, 0.25, 0.2)) if crop_pct == 0.9 else (IMAGENET_MEAN, IMAGENET_STD)
    settings = {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode, "mean": mean, "std": std}
    theirs, ours = create_transform((3, *size), **settings), Preprocess(size=size, **settings)
    for name, image in photographs().items():
        expected, got = theirs(image), ours(image)
        assert got.shape == (3, *size)
        assert got.dtype == torch.float32
        # On the scale 0..1, where one grey level is 1/255. The bound promised is 1/255; the operations are the same.
        gap = (got - expected).abs() * torch.tensor(std)[:, None, None]
        assert gap.max() < 1e-5, name


@pytest.mark.parametrize(("size", "resize", "mode"), PRESETS)
def test_equals_torchvision(size, resize, mode):
    theirs = ImageClassification(crop_size=size, resize_size=resize, interpolation=InterpolationMode(mode))
    # The fraction as the table of published weights has it, where it has it; else a hair less than the quotient, so
    # that rounding cannot carry the floor one pixel down.
    known = [
        p for s, m, p, _ in published(of_torchvision=True) if (s[0], m, math.floor(size / p)) == (size, mode, resize)
    ]
    crop_pct = known[0] if known else min(1.0, size / (resize + 0.5)) if resize > size else 1.0
    ours = Preprocess(size=(size, size), interpolation=mode, crop_pct=crop_pct)
    for name, image in photographs().items():
        gap = (ours(image) - theirs(image)).abs() * torch.tensor(IMAGENET_STD)[:, None, None]
        assert gap.max() <= 1 / 255, name
        assert gap.mean() <= 1e-3, name


def test_every_published_setting_of_torchvisions_is_one_of_its_presets():
    for size, interpolation, crop_pct, _ in published(of_torchvision=True):
        assert (size[0], math.floor(size[0] / crop_pct), interpolation) in PRESETS


def test_grey():
    image = photographs()["china"]
    ours = Preprocess(size=(64, 64), mean=(0.3,), std=(0.2,), channels=1, crop_mode="border")
    theirs = create_transform(
        (1, 64, 64), interpolation="bicubic", crop_pct=1.0, crop_mode="border", mean=(0.3,), std=(0.2,)
    )
    assert (ours(image) - theirs(image.convert("L"))).abs().max() * 0.2 < 1e-5


def test_any_mode_is_made_plain_first():
    ours = Preprocess(size=(32, 32))
    white = ours(Image.new("RGB", (40, 40), "white"))
    assert torch.equal(ours(Image.new("RGBA", (40, 40), (10, 200, 30, 0))), white)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = photographs()["china"].resize((64, 32))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.info["exif"] = exif.tobytes()
    assert torch.equal(ours(turned), ours(image))
    with pytest.raises(BadImage, match="floats from"):
        ours(Image.fromarray(np.full((40, 40), 1e6, dtype=np.float32)))


def test_normalize_batches():
    p = Preprocess(size=(8, 8))
    batch = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (batch.double() / 255 - mean) / std
    before = batch.clone()
    assert (p.normalize(batch) - expected).abs().max() < 1e-6
    floats = batch.to(torch.float32)
    assert (p.normalize(floats) - expected).abs().max() < 1e-6
    assert torch.equal(batch, before)
    assert torch.equal(floats, before.to(torch.float32))


def test_keeps():
    assert Preprocess(size=(8, 8)).keeps(8, 8)
    assert not Preprocess(size=(8, 8)).keeps(9, 8)
    assert not Preprocess(size=(8, 8), crop_pct=0.875).keeps(8, 8)


def test_records_round_trip():
    p = Preprocess(size=(192, 320), crop_pct=0.9, crop_mode="border", interpolation="bilinear")
    assert Preprocess.from_dict(p.to_dict()) == p
    assert Preprocess.from_timm(p.to_timm()) == p
    assert hash(Preprocess.from_dict(p.to_dict())) == hash(p)
    assert Preprocess.from_timm({"input_size": (3, 224, 224)}).crop_pct == 0.875
    assert p.replace(size=(8, 8)).size == (8, 8)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"size": [224]}, "size"),
        ({"size": [0, 3]}, "size"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"crop_mode": "pad"}, "border"),
        ({"crop_pct": 0}, "crop_pct"),
        ({"crop_pct": "much"}, "crop_pct"),
        ({"channels": 1}, "channels"),
        ({"std": [0.2, 0.0, 0.2]}, "std"),
        ({"mean": [float("nan"), 0, 0]}, "mean"),
        ({"crop_pc": 0.9}, "crop_pct"),
    ],
)
def test_nonsense_is_refused(change, word):
    record = Preprocess(size=(224, 224)).to_dict() | change
    with pytest.raises(ConfigError, match=word) as error:
        Preprocess.from_dict(record)
    assert "\n" not in str(error.value)


def test_import_needs_no_heavy_library():
    code = "import sys, vitrail.images.preprocess; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("count", [1, 5, 7])
def test_large_batches_are_normalised_in_parts_with_equal_bits(count: int) -> None:
    """Batches beyond a processor's cache take another way to the same numbers."""
    p = Preprocess(size=(224, 224))
    batch = torch.randint(0, 256, (count, 3, 300, 224), dtype=torch.uint8)
    whole = torch.cat([p.normalize(batch[i : i + 1]) for i in range(count)])
    assert torch.equal(p.normalize(batch), whole)
    plain = (batch.double() / 255 - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
    torch.testing.assert_close(p.normalize(batch).double(), plain, atol=2e-6, rtol=0)
    strided = batch.transpose(2, 3)
    assert torch.equal(p.normalize(strided), p.normalize(strided.contiguous()))
