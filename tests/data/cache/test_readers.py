"""Views do not depend on the cache: filled or empty, unlimited or limited, on any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from data.crops import read_crops
from data.make_folder import make_folder
from vitrail.data.augment.crop import CROP_DRAWS, crop_box
from vitrail.data.cache.readers import (
    cache_size,
    cached_reader,
    cached_shapes,
    decode_shrunk,
    max_short_side,
    shrunk_size,
)
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit, FileSplit
from vitrail.data.loader import TrainLoader
from vitrail.images.preprocess import Preprocess
from vitrail.images.resize import resize_part
from vitrail.utils.counter_rng import uniform

P = Preprocess(size=(32, 32), crop_pct=0.9)


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind, and photographs that are larger than what is stored."""
    root = make_folder(tmp_path_factory.mktemp("decoded"), broken=False).root
    for number, name in enumerate(("china.jpg", "flower.jpg")):
        photo = Image.fromarray(load_sample_image(name))
        photo.save(root / f"class{number}" / "photo.jpg")
        photo.rotate(90, expand=True).save(root / f"class{number}" / "tall.png")
    return root


@pytest.fixture(scope="module")
def split(folder: Path) -> FileSplit:
    found = open_dataset(folder, val_fraction=0, test_fraction=0).split("train")
    assert isinstance(found, FileSplit)
    assert len(found) == 28
    return found


def views(split: FileSplit, read, *, workers: int = 0, crop: bool = True, epochs: int = 2) -> list[torch.Tensor]:
    scale = (0.08, 1.0) if crop else None
    loader = TrainLoader(split, P, batch_size=7, seed=5, workers=workers, crop_scale=scale, read=read)
    found = [batch.images for epoch in range(epochs) for batch in loader.epoch(epoch)]
    loader.close()
    return found


def assert_same(one: list[torch.Tensor], two: list[torch.Tensor]) -> None:
    assert len(one) == len(two) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def read(split: FileSplit, limit: int = 1 << 30, *, random_crop: bool = True):
    return cached_reader(split, P, limit, pytest.fail, random_crop=random_crop)


def test_views_do_not_depend_on_what_is_stored(split: FileSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    cold = views(split, read(split))
    assert_same(views(split, read(split)), cold)  # filled
    assert_same(views(split, read(split), workers=3), cold)
    total = cache_size(split, P, random_crop=True)
    monkeypatch.setenv("VITRAIL_CACHE", "/dev/null/no")
    said: list[str] = []
    assert_same(
        views(split, cached_reader(split, P, total, said.append, random_crop=True)), cold
    )  # a disk that cannot be written
    assert "cache   off" in said[0]
    assert_same(views(split, read(split, 0)), cold)


def test_a_limited_cache_stores_a_part(split: FileSplit) -> None:
    half = cache_size(split, P, random_crop=True) // 2
    cold = views(split, read(split, half), workers=2)
    assert_same(views(split, read(split, half)), cold)
    assert_same(views(split, read(split)), cold)


def test_later_epochs_decode_nothing(split: FileSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, crops = read(split), read(split, random_crop=False)
    first = views(split, keep, epochs=1)
    read_crops(split, P, crops)
    monkeypatch.setattr(FileSplit, "image", lambda *_: pytest.fail("decoded again"))
    assert_same(views(split, keep, epochs=1), first)
    assert_same(views(split, read(split), epochs=1), first)
    assert len(views(split, keep)) == 8
    assert len(read_crops(split, P, crops)[0]) == 28


@pytest.mark.parametrize("fit", ["center", "border", "squash"])
def test_evaluation_is_exact(split: FileSplit, fit: str) -> None:
    p = P.replace(crop_mode=fit)
    plain, _ = read_crops(split, p)
    for _ in range(2):
        kept = cached_reader(split, p, 1 << 30, pytest.fail, random_crop=False)
        np.testing.assert_array_equal(read_crops(split, p, kept)[0], plain)
    assert_same(views(split, read(split, random_crop=False), crop=False), views(split, None, crop=False))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_has_the_predicted_shape(split: FileSplit, channels: int) -> None:
    p = P if channels == 3 else P.replace(channels=1, mean=(0.5,), std=(0.5,))
    shapes = cached_shapes(split, p, random_crop=True)
    side = max_short_side(p)
    assert side == 64
    for row, (height, width) in enumerate(shapes.tolist()):
        pixels = decode_shrunk(split, row, channels, side)
        assert pixels.shape == (height, width, channels), split.name(row)
        full = split.image(row)
        if min(full.size) <= side:  # stored unchanged
            assert (full.height, full.width) == (height, width)
            want = np.asarray(full if channels == 3 else full.convert("L")).reshape(pixels.shape)
            np.testing.assert_array_equal(pixels, want)
        else:
            assert min(height, width) == side
            near = full.resize((width, height), Image.Resampling.BICUBIC)
            near = np.asarray(near if channels == 3 else near.convert("L")).reshape(pixels.shape)
            assert np.abs(pixels.astype(int) - near).mean() < 3  # a JPEG was decoded at half the size first
    assert cache_size(split, p, random_crop=True) == channels * shapes.prod(axis=1).sum()
    assert cache_size(split, p, random_crop=False) == channels * 32 * 32 * len(split)


def test_splits_that_are_not_cached() -> None:
    arrays = ArraySplit(np.zeros((3, 8, 8), np.uint8), np.arange(3))
    assert cache_size(arrays, P, random_crop=True) == 0
    assert cache_size(FileSplit(["a.jpg"], np.zeros(1, dtype=np.int64)), P, random_crop=True) == 0


def test_shrunk_size() -> None:
    assert shrunk_size(375, 500, 448) == (375, 500)
    assert shrunk_size(3000, 4000, 448) == (448, 597)
    assert shrunk_size(4000, 3000, 448) == (597, 448)
    assert shrunk_size(449, 449, 448) == (448, 448)
    assert shrunk_size(10, 9000, 64) == (10, 9000)


def test_an_image_that_is_damaged_later_is_replaced_each_time(folder: Path, tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((40, 40, 3), 40 * number, np.uint8)).save(path)
        paths.append(str(path))
    split = FileSplit(paths, np.arange(6) % 2, sizes=np.full((6, 2), 40))
    Path(paths[2]).write_bytes(b"no longer an image")
    loader = TrainLoader(split, P, batch_size=3, crop_scale=(0.5, 1), workers=2, read=read(split))
    for epoch in range(3):
        rows = [row for batch in loader.epoch(epoch) for row in batch.indices.tolist()]
        assert (len(rows), set(rows)) == (6, {0, 1, 3, 4, 5})
        assert [item["path"] for item in loader.skipped] == [paths[2]]
    loader.close()


@pytest.mark.parametrize(("interpolation", "rare"), [("bilinear", 0.0), ("bicubic", 2e-4), ("lanczos", 0.0)])
def test_resizing_is_pillows(interpolation: str, rare: float) -> None:
    """The difference is at most 1 of 255, except for few values with bicubic interpolation."""
    photo = load_sample_image("china.jpg")
    for row in range(12):
        draw = uniform(0, 0, [row], "crop", CROP_DRAWS)[0]
        top, left, h, w = crop_box(427, 640, (0.05, 1.0), (3 / 4, 4 / 3), draw)
        out = torch.empty(3, 96, 112, dtype=torch.uint8)
        resize_part(photo, (top, left, h, w), interpolation, out)
        part = Image.fromarray(np.ascontiguousarray(photo[top : top + h, left : left + w]))
        want = np.asarray(part.resize((112, 96), Image.Resampling[interpolation.upper()])).transpose(2, 0, 1)
        apart = np.abs(out.numpy().astype(int) - want)
        assert (apart > 1).mean() <= rare
        assert apart.max() <= 10
        assert (apart > 0).mean() < 0.25


def test_resizing_is_torchvisions() -> None:
    """Bit-identical to its transforms of uint8 tensors, which without AVX2 compute in float32 and round."""
    from torchvision.transforms.v2.functional import resized_crop

    photo = load_sample_image("flower.jpg")
    for row in range(8):
        draw = uniform(0, 0, [row], "crop", CROP_DRAWS)[0]
        out = torch.empty(3, 64, 48, dtype=torch.uint8)
        box = top, left, h, w = crop_box(427, 640, (0.08, 1.0), (3 / 4, 4 / 3), draw)
        resize_part(photo, box, "bilinear", out)
        tensor = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        expected = resized_crop(tensor, top, left, h, w, [64, 48], antialias=True)
        largest = (out.int() - expected.int()).abs().max()
        assert largest <= (torch.backends.cpu.get_cpu_capability() == "DEFAULT")


def test_grey_is_resized_too() -> None:
    photo = load_sample_image("flower.jpg")[:, :, :1]
    out = torch.empty(1, 20, 30, dtype=torch.uint8)
    for interpolation in ("bilinear", "hamming"):
        resize_part(photo, (10, 20, 100, 160), interpolation, out)
        part = Image.fromarray(np.ascontiguousarray(photo[10:110, 20:180, 0]))
        want = np.asarray(part.resize((30, 20), Image.Resampling[interpolation.upper()]))
        assert np.abs(out[0].numpy().astype(int) - want).max() <= 1
