"""RandAugment against timm's own operations on Pillow images."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_transform

from vitrail.data.augment.randaugment import DRAWS, OPS, _histograms, apply, rand_augment
from vitrail.utils.counter_rng import uniform

TIMM = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing", "ShearX", "ShearY",
    "TranslateXRel", "TranslateYRel",
)  # fmt: skip
GEOMETRY = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
FILL = (124, 116, 104)


def photos(channels: int, height: int = 61, width: int = 84) -> np.ndarray:
    """Six crops of two photographs, two of them with low contrast, and one image of a single value: N H W C."""
    crops = []
    for number in range(6):
        pixels = load_sample_image(("china.jpg", "flower.jpg")[number % 2])[30 * number :, 50 * number :]
        crop = Image.fromarray(pixels).crop((0, 0, 3 * width, 3 * height)).resize((width, height))
        crops.append(np.asarray(crop.convert("L" if channels == 1 else "RGB")).reshape(height, width, channels))
    crops[4], crops[5] = 60 + crops[4] // 3, 200 - crops[5] // 5
    return np.stack([*crops, np.full_like(crops[0], 77)])


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def timms(name: str, image: np.ndarray, level: float, sign: float, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """timm's operation, with the given sign instead of a random one."""
    monkeypatch.setattr("timm.data.auto_augment.random.random", lambda: 1.0 if sign < 0 else 0.0)
    to_argument = LEVEL_TO_ARG[name]
    arguments = to_argument(level, {}) if to_argument else ()
    fill = FILL if image.shape[2] == 3 else FILL[0]
    done = NAME_TO_OP[name](picture(image), *arguments, resample=Image.Resampling.BILINEAR, fillcolor=fill)
    return np.asarray(done).reshape(image.shape)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "theirs"), list(zip(OPS, TIMM, strict=True)))
def test_an_operation_is_timms(name: str, theirs: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bytes; with interpolation within 1 of 255 except for 0.1 % of the pixels, and within 0.05 on average."""
    images = photos(channels)
    for sign in (-1.0, 1.0):
        levels = np.array([9.0, 0.0, 10.0, 4.37, 8.61, 9.53, 2.5])
        got = apply(name, tensor(images), levels, np.full(7, sign), FILL[:channels]).numpy().transpose(0, 2, 3, 1)
        if name == "posterize":  # at 10 timm keeps 0 bits, which Pillow refuses; ours keeps 1
            levels = levels.clip(max=9.99)
        for image, level, one in zip(images, levels, got, strict=True):
            expected = timms(theirs, image, float(level), sign, monkeypatch)
            far = np.abs(one.astype(int) - expected.astype(int))
            if name in GEOMETRY:
                assert (far > 1).mean() < 1e-3, (level, sign)
                assert far.mean() < 0.05
            else:
                assert far.max() <= (name == "auto_contrast"), (level, sign)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_equals_timms(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same random numbers: the operations, whether each is applied, its magnitude and its sign."""
    count = 40
    images = np.concatenate([photos(channels)[:4]] * (count // 4))
    fill = FILL if channels == 3 else FILL[:1]
    hparams = {"img_mean": fill if channels == 3 else fill[0], "interpolation": Image.Resampling.BILINEAR}
    transform = rand_augment_transform("rand-m7-n2-mstd1.0-inc1", hparams)
    assert [op.name for op in transform.ops] == list(TIMM)
    u = uniform(0, 0, np.arange(count), "rand_augment", 2 * DRAWS)
    got = rand_augment(tensor(images), u, magnitude=7, std=1.0, fill=fill).numpy().transpose(0, 2, 3, 1)
    different = 0
    for image, row, one in zip(images, u.reshape(count, 2, DRAWS), got, strict=True):
        done = picture(image)
        for which, applied, normal, side in row:
            draws = iter([applied, 1 - side])
            monkeypatch.setattr("timm.data.auto_augment.random.random", lambda draws=draws: next(draws))
            monkeypatch.setattr("timm.data.auto_augment.random.gauss", lambda m, s, n=normal: m + s * norm.ppf(n))
            done = transform.ops[int(which * len(OPS))](done)
        expected = np.asarray(done).reshape(image.shape)
        different += not np.array_equal(expected, image)
        assert np.abs(one.astype(int) - expected.astype(int)).mean() < 0.2
    assert (
        0.6 * count < different < 0.9 * count
    )  # with two operations of probability 0.5, a quarter of the images gets none


def test_input_is_unchanged_and_results_do_not_depend_on_the_batch() -> None:
    images = tensor(np.concatenate([photos(3)] * 6))
    before, rows = images.clone(), np.arange(len(images))
    u = uniform(3, 1, rows, "rand_augment", 2 * DRAWS)
    whole = rand_augment(images, u, magnitude=9, std=0.5, fill=FILL)
    assert torch.equal(images, before)
    assert whole.dtype == torch.uint8
    order = np.random.default_rng(0).permutation(len(rows))
    for some in (order, order[:5], order[7:8]):
        assert torch.equal(rand_augment(images[some], u[some], magnitude=9, std=0.5, fill=FILL), whole[some])


def test_every_operation_is_drawn_equally_often() -> None:
    u = uniform(0, 0, np.arange(30_000), "rand_augment", DRAWS)
    counts = np.bincount(np.floor(u[:, 0] * len(OPS)).astype(int), minlength=len(OPS))
    assert abs(counts / 2000 - 1).max() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (8, 8)])
def test_the_smallest_images(size: tuple[int, int]) -> None:
    images = torch.randint(0, 256, (15, 1, *size), dtype=torch.uint8)
    for name in OPS:
        assert apply(name, images, np.full(15, 9.0), np.ones(15), (3,)).shape == images.shape


def test_histograms_equal_those_computed_on_accelerators() -> None:
    """The code for accelerators, run on the CPU: histograms by scatter."""
    images = tensor(photos(3))
    counts = _histograms(images)
    flat = images.flatten(2).long()
    scattered = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64).scatter_add_(2, flat, torch.ones_like(flat))
    assert torch.equal(counts, scattered)
