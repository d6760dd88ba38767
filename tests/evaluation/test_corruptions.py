"""Corruptions against scikit-image and Pillow, and what holds for each of them."""

import io

import numpy as np
import numpy.typing as npt
import pytest
import skimage.color
import skimage.data
import skimage.exposure
import skimage.filters
import skimage.transform
from PIL import Image

from vitrail.errors import ConfigError
from vitrail.evaluation.corruptions import CORRUPTIONS, SEVERITIES, corrupt, shuffle_patches, translate

Pixels = npt.NDArray[np.uint8]
SIDES = (28, 96, 224)


def photograph(side: int, channels: int = 3) -> Pixels:
    image = Image.fromarray(skimage.data.chelsea()).crop((100, 0, 400, 300)).resize((side, side), Image.Resampling.BOX)
    pixels = np.asarray(image if channels == 3 else image.convert("L"))
    return pixels.reshape(side, side, channels).copy()


def distance(a: Pixels, b: Pixels) -> float:
    return float(np.square(a.astype(float) - b).mean() ** 0.5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_changes_more_with_severity(name: str, side: int, channels: int) -> None:
    image = photograph(side, channels)
    before = image.copy()
    for index in (0, 1):
        found = [corrupt(image, name, severity, index=index) for severity in SEVERITIES]
        assert all(each.dtype == np.uint8 and each.shape == image.shape for each in found)
        distances = [distance(image, each) for each in found]
        assert distances == sorted(distances)
        assert distances[0] > 0.5
        assert distances[-1] > 1.2 * distances[0]
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_are_those_of_seed_and_index(name: str) -> None:
    image = photograph(40)
    first = corrupt(image, name, 3, seed=1, index=5)
    np.testing.assert_array_equal(first, corrupt(image, name, 3, seed=1, index=5))
    others = [corrupt(image, name, 3, seed=seed, index=index) for seed in (1, 2) for index in range(6, 12)]
    random = name in ("noise", "occlusion", "rotation")
    assert any(not np.array_equal(first, other) for other in others) == random


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_shape_and_number_of_channels(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 47, 5), dtype=np.uint8)
    for pixels in (image, image[:8, :8, :2], np.zeros((9, 7, 3), np.uint8), np.full((9, 7, 1), 255, np.uint8)):
        found = corrupt(pixels, name, 5)
        assert (found.shape, found.dtype) == (pixels.shape, np.uint8)


def test_severities_at_32_and_224_pixels_are_those_of_the_benchmarks() -> None:
    assert [CORRUPTIONS["blur"].amount(each, 32) for each in SEVERITIES] == pytest.approx([0.4, 0.6, 0.7, 0.8, 1.0])
    assert [CORRUPTIONS["blur"].amount(each, 224) for each in SEVERITIES] == pytest.approx([1, 2, 3, 4, 6])
    assert CORRUPTIONS["blur"].amount(5, 448) == pytest.approx(12)
    assert CORRUPTIONS["blur"].amount(5, 16) == pytest.approx(0.5)
    assert CORRUPTIONS["noise"].amount(5, 512) == pytest.approx(0.38)
    assert CORRUPTIONS["noise"].amount(5, 28) == pytest.approx(0.10)
    middle = (32 * 224) ** 0.5
    assert CORRUPTIONS["jpeg"].amount(1, middle) == pytest.approx(52.5)


@pytest.mark.parametrize(("side", "std"), [(32, 0.08), (224, 0.18)])
def test_noise_has_the_standard_deviation_of_its_severity(side: int, std: float) -> None:
    grey = np.full((side, side, 3), 128, np.uint8)
    noise = corrupt(grey, "noise", 3).astype(float) - 128
    kept = noise[np.abs(noise) < 120]  # the rest may be clipped
    assert noise.size - kept.size < 0.02 * noise.size
    assert kept.std() / 255 == pytest.approx(std, rel=0.05)
    assert abs(kept.mean()) < 4 * kept.std() / kept.size**0.5


def test_blur_is_scikit_images() -> None:
    image = photograph(224)
    expected = skimage.filters.gaussian(image, sigma=3, channel_axis=2, mode="nearest", preserve_range=True)
    assert np.abs(corrupt(image, "blur", 3) - expected).max() <= 0.51


def test_brightness_is_that_of_scikit_images_hsv() -> None:
    image = photograph(224)
    image[:4, :4] = 0
    hsv = skimage.color.rgb2hsv(image)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    assert np.abs(corrupt(image, "brightness", 3) - 255 * skimage.color.hsv2rgb(hsv)).max() <= 0.51


def test_contrast_scales_the_deviations_from_each_channels_mean() -> None:
    image = photograph(224)
    found = corrupt(image, "contrast", 3).astype(float)
    mean = image.mean(axis=(0, 1))
    np.testing.assert_allclose(found.mean(axis=(0, 1)), mean, atol=0.2)
    np.testing.assert_allclose(found.std(axis=(0, 1)), 0.2 * image.std(axis=(0, 1)), atol=0.2)


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_jpeg_is_pillows(channels: int, mode: str) -> None:
    image = photograph(224, channels)
    file = io.BytesIO()
    Image.fromarray(image if channels == 3 else image[..., 0], mode=None).save(file, "JPEG", quality=15)
    decoded = Image.open(file)
    assert decoded.mode == mode
    np.testing.assert_array_equal(corrupt(image, "jpeg", 3), np.asarray(decoded).reshape(image.shape))


def test_occlusion_covers_its_share_with_the_mean() -> None:
    image = photograph(100)
    found = corrupt(image, "occlusion", 4, index=3)
    changed = (found == np.rint(image.mean(axis=(0, 1)))).all(axis=2)
    rows, columns = np.flatnonzero(changed.sum(axis=1) > 25), np.flatnonzero(changed.sum(axis=0) > 25)
    assert (len(rows), len(columns)) == (50, 50)
    outside = np.ones((100, 100), bool)
    outside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = False
    np.testing.assert_array_equal(found[outside], image[outside])


def test_rotation_is_scikit_images_to_either_side() -> None:
    image = photograph(224)
    inside = (slice(60, -60), slice(60, -60))
    sides = set()
    for index in range(8):
        found = corrupt(image, "rotation", 3, index=index).astype(float)
        errors = {
            angle: np.abs(skimage.transform.rotate(image, angle, order=1, preserve_range=True) - found)[inside].max()
            for angle in (18, -18)
        }
        best = min(errors, key=lambda angle: errors[angle])
        assert errors[best] <= 0.51
        sides.add(best)
    assert sides == {18, -18}


def test_translation_moves_every_pixel_by_that_many() -> None:
    image = photograph(50)
    directions = set()
    for index in range(20):
        found = translate(image, 7, index=index)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found, translate(image, 7, index=index))
        same = {
            (down, right)
            for down, right in ((7, 0), (-7, 0), (0, 7), (0, -7))
            if np.array_equal(np.roll(image, (down, right), (0, 1))[7:-7, 7:-7], found[7:-7, 7:-7])
        }
        assert len(same) == 1
        directions |= same
    assert len(directions) == 4
    np.testing.assert_array_equal(translate(image, 0), image)


def test_shuffled_patches_are_the_patches_of_the_image() -> None:
    image = photograph(30)
    found = shuffle_patches(image, 4, index=1)

    def patches(pixels: Pixels) -> list[bytes]:
        return [pixels[y : y + 7, x : x + 7].tobytes() for y in range(0, 28, 7) for x in range(0, 28, 7)]

    assert patches(found) != patches(image)
    assert sorted(patches(found)) == sorted(patches(image))
    np.testing.assert_array_equal(found[28:], image[28:])
    np.testing.assert_array_equal(found, shuffle_patches(image, 4, index=1))
    assert not np.array_equal(found, shuffle_patches(image, 4, index=2))
    np.testing.assert_array_equal(shuffle_patches(image, 1), image)


def test_what_is_not_known_is_refused() -> None:
    image = photograph(28)
    with pytest.raises(ConfigError, match=r"'blurr'.*blur"):
        corrupt(image, "blurr", 1)
    with pytest.raises(ConfigError, match="severity 6"):
        corrupt(image, "blur", 6)
    for grid in (0, 29):
        with pytest.raises(ConfigError, match=f"{grid} x {grid}"):
            shuffle_patches(image, grid)
