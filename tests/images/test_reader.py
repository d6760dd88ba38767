"""Paths, folders, patterns, images and arrays to crops. Oracles: Preprocess on the decoded image, Pillow."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.images.decode import BadImage
from vitrail.images.preprocess import Preprocess
from vitrail.images.reader import NoImages, crop, expand

PREPROCESS = Preprocess(size=(8, 12), crop_pct=0.9)


def picture(seed: int = 0, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(("b.png", "a.JPG", "deep/er/c.webp", ".hidden.png", ".cache/d.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, format=Image.registered_extensions()[path.suffix.lower()])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    return tmp_path


def names(inputs: object, root: Path) -> list[str]:
    return [os.path.relpath(x, root) if not isinstance(x, NoImages) else f"!{x.error}" for x in expand(inputs)]  # type: ignore[arg-type]


def test_a_folder_is_searched_all_the_way_down(folder: Path) -> None:
    assert names(folder, folder) == ["a.JPG", "b.png", "deep/er/c.webp"]
    assert names(str(folder / "deep"), folder) == ["deep/er/c.webp"]


def test_a_pattern_is_matched_and_its_folders_searched(folder: Path) -> None:
    assert names(str(folder / "*.png"), folder) == ["b.png"]
    assert names(str(folder / "d*"), folder) == ["deep/er/c.webp"]
    assert names(str(folder / "**" / "*.webp"), folder) == ["deep/er/c.webp"]


def test_a_name_with_the_signs_of_a_pattern_is_a_name_where_it_is_there(folder: Path) -> None:
    picture().save(folder / "x[1].png")
    assert names(str(folder / "x[1].png"), folder) == ["x[1].png"]


def test_what_has_no_images_is_an_error_of_its_own_and_the_others_go_on(folder: Path) -> None:
    inputs = [folder / "empty", folder / "b.png", str(folder / "*.tiff")]
    assert names(inputs, folder) == ["!contains no images", "b.png", "!matches no image"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("gone.jpg", None, "does not exist"),
        ("empty.jpg", b"", "is empty"),
        ("text.png", b"this is a letter to my aunt", "is not an image"),
        ("cut.png", "half", "truncated"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(name: str, content: object, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content == "half":
        picture(size=(200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(BadImage, match=reason):
        crop(str(path), PREPROCESS)


@pytest.mark.parametrize("shape", [(16, 20), (16, 20, 1), (16, 20, 3), (16, 20, 4)])
def test_arrays_are_as_the_images_that_they_hold(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = Image.fromarray(array[..., 0] if shape[2:] == (1,) else array)
    for preprocess in (PREPROCESS, PREPROCESS.replace(channels=1, mean=(0.5,), std=(0.5,))):
        assert np.array_equal(crop(array, preprocess), preprocess.crop(image))
        transposed = np.asfortranarray(array)  # not in the order in which Pillow reads
        assert np.array_equal(crop(transposed, preprocess), preprocess.crop(image))


def test_channels_that_are_no_colours_are_cropped_one_by_one() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 20, 5), dtype=np.uint8)
    preprocess = PREPROCESS.replace(channels=5, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(1.0,) * 5)
    pixels = crop(array, preprocess)
    assert pixels.shape == (8, 12, 5)
    for band in range(5):
        grey = preprocess.replace(channels=1, mean=(0.5,), std=(0.5,))
        assert np.array_equal(pixels[..., band], grey.crop(Image.fromarray(array[..., band]))[..., 0])


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8,), np.uint8), "(8,)"),
        (np.zeros((8, 0, 3), np.uint8), "(8, 0, 3)"),
        (np.zeros((8, 8, 7), np.uint8), "7 channels for a model of 3"),
    ],
)
def test_an_array_that_is_no_image_is_an_error(array: np.ndarray, reason: str) -> None:
    with pytest.raises(BadImage, match=re.escape(reason)):
        crop(array, PREPROCESS)


def test_a_file_for_a_model_of_five_channels_is_an_error(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    preprocess = PREPROCESS.replace(channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    with pytest.raises(BadImage, match="1 or 3 channels"):
        crop(str(tmp_path / "a.png"), preprocess)


def test_a_batch_of_arrays_and_bytes_are_taken_too(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), dtype=np.uint8)
    assert len(list(expand(array))) == 2
    picture().save(tmp_path / "a.png")
    found = crop((tmp_path / "a.png").read_bytes(), PREPROCESS)
    assert np.array_equal(found, PREPROCESS.crop(picture()))
