"""Objects in memory as data: torch datasets, torchvision's, lists, arrays, dicts; what is refused, and resuming."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import ToTensor

from data.make_folder import picture
from vitrail.data.catalog import open_dataset
from vitrail.data.contents import fingerprint
from vitrail.data.dataset import ArraySplit, Dataset, FileSplit
from vitrail.data.formats.objects import image_inputs
from vitrail.data.items import ItemSplit
from vitrail.errors import DataError, DataTypeError

NAMES = ["stripes", "waves", "dots"]
PIXELS = np.stack([np.asarray(picture(i % 3, i, (12, 16))) for i in range(60)])
LABELS = np.arange(60) % 3


class Images(torch.utils.data.Dataset[Any]):
    """Of the kind of image that `make` gives; fails if two threads read at once."""

    def __init__(self, make: Any, classes: bool = True) -> None:
        self.make, self.busy = make, 0
        if classes:
            self.classes = NAMES

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, row: int) -> Any:
        self.busy += 1
        assert self.busy == 1, "two threads read at once"
        image = self.make(PIXELS[row])
        self.busy -= 1
        return image, int(LABELS[row])


KINDS = {
    "pillow": Image.fromarray,
    "uint8 tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
    "ToTensor": lambda pixels: ToTensor()(pixels),
    "array": lambda pixels: pixels,
}


def all_pixels(dataset: Dataset) -> dict[int, np.ndarray]:
    """By the number in each image's name."""
    return {
        int(split.name(i).rpartition("/")[2]): np.asarray(split.image(i))
        for split in dataset.splits.values()
        for i in range(len(split))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_torch_datasets(kind: str) -> None:
    dataset = open_dataset(Images(KINDS[kind]))
    assert dataset.name == "memory:Images"
    assert dataset.class_names == tuple(NAMES)
    assert dataset.counts() == {"train": 48, "val": 6, "test": 6}
    for row, pixels in all_pixels(dataset).items():
        np.testing.assert_array_equal(pixels, PIXELS[row])
    for split in dataset.splits.values():
        assert split.labels.tolist() == [int(split.name(i).rpartition("/")[2]) % 3 for i in range(len(split))]


def test_they_are_read_by_one_thread_at_a_time() -> None:
    split = open_dataset(Images(KINDS["array"])).splits["train"]
    start = threading.Barrier(4)

    def read(offset: int) -> None:
        start.wait()
        for row in range(offset, len(split), 4):
            split.image(row)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_a_tensor_dataset_and_a_subset() -> None:
    images, labels = torch.from_numpy(PIXELS).permute(0, 3, 1, 2), torch.from_numpy(LABELS)
    whole = torch.utils.data.TensorDataset(images, labels)
    dataset = open_dataset(torch.utils.data.Subset(whole, range(30)))
    assert dataset.name == "memory:TensorDataset"
    assert dataset.class_names == ("0", "1", "2")
    assert sorted(all_pixels(dataset)) == list(range(30))


def test_image_folder_is_read_as_files(tmp_path) -> None:
    for i in range(60):
        file = tmp_path / NAMES[i % 3] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        picture(i % 3, i).save(file)
    folder = ImageFolder(str(tmp_path))
    dataset, ours = open_dataset(folder), open_dataset(tmp_path)
    assert dataset.class_names == ours.class_names == tuple(folder.classes)
    train = dataset.splits["train"]
    assert isinstance(train, FileSplit)
    assert all(NAMES[0] in path for path, label in zip(train.paths, train.labels, strict=True) if label == 1)
    halves = torch.utils.data.random_split(folder, [40, 20], torch.Generator().manual_seed(0))
    dataset = open_dataset({"train": halves[0], "val": halves[1]})
    assert dataset.counts() == {"train": 40, "val": 20}
    for half, split in zip(halves, dataset.splits.values(), strict=True):
        assert split.paths == [folder.samples[i][0] for i in half.indices]
        assert split.labels.tolist() == [folder.samples[i][1] for i in half.indices]
    with pytest.warns(UserWarning, match="transform of ImageFolder is not applied"):
        open_dataset(ImageFolder(str(tmp_path), ToTensor()))
    other = open_dataset(ImageFolder(str(tmp_path), target_transform=lambda label: label % 2))
    assert isinstance(other.splits["train"], ItemSplit)
    assert set(other.splits["train"].labels.tolist()) == {0, 1}


def test_lists(tmp_path) -> None:
    pairs = []
    for i in range(60):
        picture(i % 3, i).save(tmp_path / f"{i}.png")
        pairs.append((str(tmp_path / f"{i}.png"), NAMES[i % 3]))
    files, images = open_dataset(pairs), open_dataset([(pixels, NAMES[i % 3]) for i, pixels in enumerate(PIXELS)])
    assert files.class_names == images.class_names == tuple(sorted(NAMES))
    assert files.counts() == images.counts() == {"train": 48, "val": 6, "test": 6}
    assert isinstance(files.splits["train"], FileSplit)
    assert len(all_pixels(images)) == 60


@pytest.mark.parametrize("grey", [False, True])
def test_arrays(grey: bool) -> None:
    dataset = open_dataset((PIXELS[..., 0] if grey else PIXELS, [NAMES[i] for i in LABELS]))
    assert dataset.channels == (1 if grey else 3)
    assert all(isinstance(split, ArraySplit) for split in dataset.splits.values())
    for row, pixels in all_pixels(dataset).items():
        np.testing.assert_array_equal(pixels, PIXELS[row, ..., 0] if grey else PIXELS[row])


def test_a_dict_has_its_splits() -> None:
    part = (PIXELS[:9], LABELS[:9])
    dataset = open_dataset({"train": Images(KINDS["array"], classes=False), "validation": part, "test": part})
    assert dataset.counts() == {"train": 60, "val": 9, "test": 9}
    frame = pandas.DataFrame({"path": ["a.png"], "label": ["x"], "split": ["val"]})
    with pytest.raises(DataError):
        open_dataset({"train": part, "val": frame})


@pytest.mark.parametrize(
    "data",
    [
        5,
        None,
        [],
        [1, 2],
        PIXELS,
        torch.zeros(2, 3, 8, 8),
        torch.utils.data.DataLoader(Images(KINDS["array"])),
        (pair for pair in [("a.png", "cat")]),
        {"train": 5},
        {"pictures": (PIXELS, LABELS)},
        {"train": (PIXELS, LABELS), "training": (PIXELS, LABELS)},
        (PIXELS.astype(np.float32), LABELS),
        [(PIXELS[0], 1.5)],
        [("not an image", 1), (PIXELS[0], 2)],
        Images(lambda pixels: ToTensor()(pixels) * 4 - 2),
        Images(lambda pixels: 5),
    ],
    ids=lambda data: type(data).__name__,
)
def test_anything_else_is_a_type_error(data: Any) -> None:
    with pytest.raises(TypeError) as caught:
        open_dataset(data)
    assert isinstance(caught.value, DataTypeError)
    assert "give " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_items_that_fail_are_skipped() -> None:
    def make(pixels: np.ndarray) -> np.ndarray:
        if (pixels == PIXELS[7]).all():
            raise OSError("disk on fire")
        return pixels

    class Failing(Images):
        def __getitem__(self, row: int) -> Any:
            self.busy = 0
            return super().__getitem__(row)

    dataset = open_dataset(Failing(make))
    assert dataset.skipped == [{"path": "data/7", "reason": "could not be read: disk on fire"}]
    assert sum(dataset.counts().values()) == 59


def test_fingerprints_change_with_the_content() -> None:
    def of(data: Any) -> Any:
        return fingerprint(open_dataset(data))

    changed = PIXELS.copy()
    changed[:, 0, 0] ^= 1
    for make in (lambda pixels: (pixels, LABELS), lambda pixels: list(zip(pixels, LABELS.tolist(), strict=True))):
        before, same, other = of(make(PIXELS)), of(make(PIXELS.copy())), of(make(changed))
        assert before == same
        assert other.difference(before.to_dict()) == "contents"
    swapped = of(list(zip(PIXELS, LABELS[::-1].tolist(), strict=True)))
    assert "labels" in swapped.difference(before.to_dict())


def test_item_splits_are_pickled_without_their_lock() -> None:
    split = open_dataset([(pixels, int(label)) for pixels, label in zip(PIXELS, LABELS, strict=True)]).splits["train"]
    copy = pickle.loads(pickle.dumps(split))
    np.testing.assert_array_equal(np.asarray(copy.image(3)), np.asarray(split.image(3)))


def test_inputs_of_predict(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("path\na.png\n")
    assert list(image_inputs(["x.jpg", tmp_path / "t.csv"])) == ["x.jpg", str(tmp_path / "a.png")]
    assert list(image_inputs(str(tmp_path / "t.csv"))) == [str(tmp_path / "a.png")]
    assert list(image_inputs(pandas.DataFrame({"image": ["b.png"]}))) == ["b.png"]
    images = list(image_inputs(Images(KINDS["array"])))
    np.testing.assert_array_equal(images, PIXELS)
