"""THE table of datasets and dataset formats, and where a dataset is opened: `open_dataset`.

To add a dataset format (a kind of table, archive, ...): one file in data/formats/ and one row in FORMATS.
To add a dataset that users open by name: one row in DATASETS; its opener is in data/formats/.
Which files are images is not decided here but in images/decode.py, and for shards in data/formats/shards.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitrail.data.contents import warn_about_leaks
from vitrail.data.dataset import Data, Dataset
from vitrail.data.formats import hf_datasets, objects, table, webdataset
from vitrail.data.formats.cifar import open_cifar
from vitrail.data.formats.digits import open_digits
from vitrail.data.formats.folder import open_folder
from vitrail.data.formats.idx import open_idx
from vitrail.data.named import DatasetFile, DatasetRow
from vitrail.data.splits import SplitOptions, make_dataset
from vitrail.errors import DataError, did_you_mean
from vitrail.utils.download import Progress
from vitrail.utils.files import user_path


@dataclass(frozen=True)
class FormatRow:
    """A format. takes: whether data are of it. opener: opens them, without the `prefix` of a string.

    is_path: whether such a string is a path on this machine, and not an address.
    """

    takes: Callable[[Any], bool]
    opener: Callable[[Any, SplitOptions, Progress | None], Dataset]
    prefix: str = ""
    is_path: Callable[[str], bool] = lambda path: True


def _prefixed(
    prefix: str,
    opener: Callable[[str, SplitOptions, Progress | None], Dataset],
    is_path: Callable[[str], bool],
) -> FormatRow:
    return FormatRow(lambda data: isinstance(data, str) and data.startswith(prefix), opener, prefix, is_path)


# The first that takes the data.
FORMATS = (
    _prefixed("wds:", webdataset.open_webdataset, lambda pattern: not webdataset.is_url(pattern)),
    _prefixed("hf-dataset:", hf_datasets.open_hf_dataset, hf_datasets.is_path),
    _prefixed(objects.MEMORY, objects.refuse_memory, lambda name: False),
    FormatRow(lambda data: isinstance(data, str) and table.is_table(data), table.open_table),
    FormatRow(lambda data: isinstance(data, str), open_folder),
    FormatRow(lambda data: True, objects.open_object),
)


def open_dataset(
    data: Data,
    *,
    data_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    group_duplicates: bool = False,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
    find_copies: bool = True,
) -> Dataset:
    """Open a dataset of DATASETS by name, or data of a format in FORMATS: a folder, a table, objects in memory, ...

    A Dataset is returned as it is, but for `class_names`. A name takes precedence over a folder of the same name in the
    working directory; write "./digits" for the folder.
    data_dir: the folder with a named dataset's files, which are otherwise downloaded. val_fraction, test_fraction: what
    is held out of train if there is no such split (test only with enough images). split_seed: decides which images are
    held out; independent of the training seed. group_duplicates: near duplicates are held out together, or not at all,
    for which every image is read; without effect on splits that the data has. class_names: a model's classes, to which
    labels are matched by name. progress: called with (done, total) bytes of a download or files of a scan. find_copies:
    warn of images that are in two splits, byte for byte. Raises DataError (DataTypeError for an object of another type)
    or ConfigError.
    """
    if isinstance(data, Dataset):
        return data if class_names is None else data.relabel(class_names)
    # Training needs two classes; the images of an evaluation may be of a single one.
    min_classes = 2 if class_names is None else 1
    options = SplitOptions(val_fraction, test_fraction, split_seed, min_classes, group_duplicates)
    row = DATASETS.get(data.lower()) if isinstance(data, str) else None
    format_row, rest = _format_of(data)
    if row is not None:
        splits = row.opener(row, Path(data_dir) if data_dir else None, progress)
        dataset = make_dataset(row.name, row.class_names, splits, options)
        dataset = replace(dataset, channels=row.channels, mean=row.mean, std=row.std)
    elif format_row.opener is not open_folder or user_path(rest).is_dir():
        dataset = format_row.opener(rest, options, progress)
        if find_copies:
            warn_about_leaks(dataset)
    else:
        hint = did_you_mean(rest, DATASETS)
        problem = "is a file, not a folder" if Path(rest).exists() else f"is neither a folder nor a known dataset{hint}"
        others = "CSV and parquet tables, wds: shards and hf-dataset: names"
        raise DataError(f"{data} {problem}; datasets: {', '.join(DATASETS)}; also {others}")
    return dataset if class_names is None else dataset.relabel(class_names)


def absolute_data(data: str | Path) -> str:
    """`data` with an absolute path, if it is one, so that it means the same in any working directory."""
    if isinstance(data, str) and data.lower() in DATASETS:
        return data
    row, rest = _format_of(data)
    return row.prefix + (os.path.abspath(os.path.expanduser(rest)) if row.is_path(rest) else str(rest))


def check_outside(out: str | Path, data: str | Path) -> None:
    """Raise DataError if `out`, which will be written, is in the folder DATA, where it would be taken for a class."""
    if str(data).lower() in DATASETS:
        return
    row, rest = _format_of(data)
    folder = user_path(rest).resolve()
    if row.is_path(rest) and folder.is_dir() and user_path(out).resolve().is_relative_to(folder):
        raise DataError(f"{out} is in the folder of images {rest}: choose --out outside of it")


def _format_of(data: Any) -> tuple[FormatRow, Any]:
    """The format, and the data without its prefix; a path becomes a string."""
    if isinstance(data, os.PathLike):
        data = os.fspath(data)
    row = next(row for row in FORMATS if row.takes(data))
    return row, data.removeprefix(row.prefix) if isinstance(data, str) else data


def _fashion_file(name: str, md5: str) -> DatasetFile:
    hosts = (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    )
    return DatasetFile(name=name, urls=tuple(host + name for host in hosts), md5=md5)


_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark
    shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

# mean and std are the results of scripts/dataset_statistics.py; CIFAR's are those widely published.
_ROWS = (
    # Alpaydin, Kaynak. Optical recognition of handwritten digits. UCI, 1998. Licence: CC BY 4.0.
    DatasetRow(
        name="digits",
        opener=open_digits,
        class_names=tuple("0123456789"),
        size=(8, 8),
        channels=1,
        mean=(0.3055,),
        std=(0.3761,),
    ),
    # Xiao, Rasul, Vollgraf. Fashion-MNIST. arXiv:1708.07747. Licence: MIT.
    DatasetRow(
        name="fashion-mnist",
        opener=open_idx,
        class_names=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        size=(28, 28),
        channels=1,
        mean=(0.2860,),
        std=(0.3530,),
        files=(
            _fashion_file("train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
            _fashion_file("train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
            _fashion_file("t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
            _fashion_file("t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
        ),
        splits={
            "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
            "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
        },
    ),
    # Krizhevsky. Learning multiple layers of features from tiny images. 2009. Its authors state no licence.
    DatasetRow(
        name="cifar10",
        opener=open_cifar,
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        size=(32, 32),
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        files=(
            DatasetFile(
                name="cifar-10-binary.tar.gz",
                urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
                md5="c32a1d4ab5d03f1284b67883e8d87530",
                sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        splits={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        folder="cifar-10-batches-bin",
    ),
    DatasetRow(
        name="cifar100",
        opener=open_cifar,
        class_names=tuple(_CIFAR100_CLASSES.split()),
        size=(32, 32),
        channels=3,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        files=(
            DatasetFile(
                name="cifar-100-binary.tar.gz",
                urls=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
                md5="03b5dce01913d631647c71ecec9e9cb8",
                sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        splits={"train": ("train.bin",), "test": ("test.bin",)},
        folder="cifar-100-binary",
        label_bytes=2,
    ),
)

DATASETS: dict[str, DatasetRow] = {row.name: row for row in _ROWS}
