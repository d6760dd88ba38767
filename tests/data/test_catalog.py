import gzip
import hashlib
import io
import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from sklearn.datasets import load_digits

from vitrail.data.catalog import DATASETS, open_dataset
from vitrail.data.dataset import ArraySplit
from vitrail.data.formats.cifar import read_cifar
from vitrail.data.formats.idx import read_idx
from vitrail.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
needs_fashion = pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")


def arrays(dataset, name) -> ArraySplit:
    split = dataset.splits[name]
    assert isinstance(split, ArraySplit)
    return split


def test_rows_are_complete():
    for name, row in DATASETS.items():
        assert name == row.name == name.lower()
        assert len(row.mean) == len(row.std) == row.channels
        assert len(set(row.class_names)) == row.num_classes
        for file in row.files:
            assert re.fullmatch("[0-9a-f]{32}", file.md5)
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert all(url.endswith(file.name) for url in file.urls)


def test_checksums_and_names_are_torchvisions():
    theirs = dict(torchvision.datasets.FashionMNIST.resources)
    for file in DATASETS["fashion-mnist"].files:
        assert theirs[file.name] == file.md5
    assert list(DATASETS["fashion-mnist"].class_names) == torchvision.datasets.FashionMNIST.classes


@pytest.mark.parametrize("name", ["digits", pytest.param("fashion-mnist", marks=needs_fashion)])
def test_means_and_stds(name):
    statistics = runpy.run_path(str(ROOT / "scripts" / "dataset_statistics.py"))["statistics"]
    assert statistics(name) == (DATASETS[name].mean, DATASETS[name].std)


def test_digits():
    dataset = open_dataset("digits")
    assert dataset.counts() == {"train": 1293, "val": 144, "test": 360}
    assert dataset.num_classes == 10
    assert (dataset.channels, dataset.sizes.median, dataset.eval_split()) == (1, (8, 8), "test")
    official = load_digits()
    seen = []
    for name in dataset.splits:
        split = arrays(dataset, name)
        assert np.bincount(split.labels).min() >= 0.09 * len(split)
        seen += [image.tobytes() for image in split.images]
        assert split.images.max() == 255
        assert set(np.unique(split.images)) <= {round(v * 255 / 16) for v in range(17)}
    everything = np.rint(official.images * 255 / 16).astype(np.uint8)
    assert sorted(seen) == sorted(image.tobytes() for image in everything)
    # The test images are part of the dataset: the same whatever the seed and fraction of val.
    other = open_dataset("digits", split_seed=5, val_fraction=0.3)
    assert np.array_equal(arrays(other, "test").images, arrays(dataset, "test").images)
    assert not np.array_equal(arrays(other, "val").images[:100], arrays(dataset, "val").images[:100])
    names = [arrays(dataset, "val").name(i) for i in range(3)]
    assert all(re.fullmatch(r"digits/train/\d+", name) for name in names)
    assert arrays(dataset, "test").name(17) == f"digits/test/{arrays(dataset, 'test').indices[17]}"
    checksum = hashlib.sha256(arrays(dataset, "test").images.tobytes()).hexdigest()
    assert checksum.startswith(GOLDEN_DIGITS_TEST), "the published test split has changed"


GOLDEN_DIGITS_TEST = "deae7ae525be24b5"


def test_names_and_errors():
    assert open_dataset("Digits").name == "digits"
    with pytest.raises(DataError, match="'digits'"):
        open_dataset("digit")
    with pytest.raises(ConfigError, match="val_fraction"):
        open_dataset("digits", val_fraction=1.0)
    with pytest.raises(ConfigError, match=r"test_fraction 0\.4"):
        open_dataset("digits", val_fraction=0.6, test_fraction=0.4)
    assert list(open_dataset("digits", val_fraction=0).splits) == ["train", "test"]
    names = [*map(str, range(9, -1, -1)), "more"]
    turned = open_dataset("digits", class_names=names)
    assert turned.class_names == tuple(names)
    assert np.array_equal(turned.splits["test"].labels, 9 - open_dataset("digits").splits["test"].labels)


@needs_fashion
def test_fashion_mnist():
    dataset = open_dataset("fashion-mnist", data_dir=DEBIAN)
    assert dataset.counts() == {"train": 54000, "val": 6000, "test": 10000}
    assert arrays(dataset, "test").images.shape == (10000, 28, 28)
    assert np.bincount(dataset.splits["val"].labels).tolist() == [600] * 10
    assert dataset.splits["test"].labels[:5].tolist() == [9, 2, 1, 1, 6]


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def test_idx_files(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    for name in ("a", "a.gz"):
        assert np.array_equal(read_idx(tmp_path / name), array)
    whole = idx(array)
    broken = {
        "empty": b"",
        "magic": b"\x01" + whole[1:],
        "floats": whole[:2] + b"\x0d" + whole[3:],
        "header": whole[:9],
        "short": whole[:-1],
        "long": whole + b"0",
        "claims": bytes([0, 0, 8, 3]) + b"\xff" * 12,
        "cut.gz": gzip.compress(whole)[:-9],
        "crc.gz": gzip.compress(whole)[:-8] + b"12345678",
        "noise.gz": b"\x1f\x8b" + b"noise" * 5,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name) as error:
            read_idx(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="No such file"):
        read_idx(tmp_path / "gone")


def small_fashion(folder: Path, zipped: bool = True, labels: int = 10) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        files = {
            f"{part}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{part}-labels-idx1-ubyte": (np.arange(count) % labels).astype(np.uint8),
        }
        for name, array in files.items():
            path = folder / (name + ".gz" if zipped else name)
            path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_mnist_from_a_folder(zipped, tmp_path):
    small_fashion(tmp_path, zipped)
    dataset = open_dataset("fashion-mnist", data_dir=tmp_path)
    assert dataset.counts() == {"train": 50, "val": 10, "test": 20}
    small_fashion(tmp_path, zipped, labels=12)
    with pytest.raises(DataError, match=r"0\.\.9"):
        open_dataset("fashion-mnist", data_dir=tmp_path)
    next(tmp_path.glob("t10k-labels*")).unlink()
    with pytest.raises(DataError, match="lacks"):
        open_dataset("fashion-mnist", data_dir=tmp_path)


def cifar_files(name: str, per_file: int = 20) -> tuple[dict[str, bytes], np.ndarray, np.ndarray]:
    """Files in the binary format, with the images (planes first) and labels of all but the test file."""
    row, rng = DATASETS[name], np.random.default_rng(0)
    files, images, labels = {}, [], []
    for split, members in row.splits.items():
        for member in members:
            x = rng.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
            y = rng.permutation(per_file).astype(np.uint8) % row.num_classes
            head = [y[:, None]] if row.label_bytes == 1 else [y[:, None] // 5, y[:, None]]
            files[f"{row.folder}/{member}"] = np.concatenate([*head, x.reshape(per_file, -1)], axis=1).tobytes()
            if split == "train":
                images.append(x)
                labels.append(y)
    return files, np.concatenate(images), np.concatenate(labels)


def tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["archive", "extracted", "inside"])
def test_cifar(name, place, tmp_path):
    files, images, labels = cifar_files(name)
    row = DATASETS[name]
    if place == "archive":
        tar(tmp_path / row.files[0].name, {**files, "../../climbs.bin": b"x", f"{row.folder}/readme.html": b"about"})
    for member, content in files.items() if place != "archive" else ():
        path = tmp_path / member
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    dataset = open_dataset(name, data_dir=tmp_path / row.folder if place == "inside" else tmp_path, val_fraction=0)
    train = arrays(dataset, "train")
    assert np.array_equal(train.images, images.transpose(0, 2, 3, 1))
    assert np.array_equal(train.labels, labels)
    assert len(arrays(dataset, "test")) == 20
    assert np.asarray(train.image(3)).tolist() == images[3].transpose(1, 2, 0).tolist()
    assert train.images.transpose(0, 3, 1, 2).flags.c_contiguous  # so that batches are gathered without a copy of all
    held = open_dataset(name, data_dir=tmp_path / row.folder if place == "inside" else tmp_path)
    assert arrays(held, "train").images.transpose(0, 3, 1, 2).flags.c_contiguous
    assert not list(tmp_path.parent.glob("climbs*"))


def test_cifar_damage(tmp_path):
    row = DATASETS["cifar10"]
    files, _, _ = cifar_files("cifar10")
    archive = tmp_path / row.files[0].name
    test_file = f"{row.folder}/test_batch.bin"

    def refused(match):
        with pytest.raises(DataError, match=match) as error:
            open_dataset("cifar10", data_dir=tmp_path)
        assert "\n" not in str(error.value)

    refused("cifar-10-binary.tar.gz")
    tar(archive, {k: v for k, v in files.items() if k != test_file})
    refused("test_batch.bin")
    tar(archive, {**files, test_file: files[test_file][:-1]})
    refused("test_batch.bin")
    tar(archive, {**files, test_file: b"\x0a" + files[test_file][1:]})
    refused("label 10")
    tar(archive, files)
    archive.write_bytes(archive.read_bytes()[:-2000])
    refused("damaged")
    archive.write_bytes(b"no archive")
    refused("damaged")
    with pytest.raises(DataError, match="gone"):
        read_cifar(tmp_path / "gone", row)


def test_import_needs_no_torch():
    code = "import sys, vitrail.data.catalog; print('torch' in sys.modules, 'sklearn' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False False"
