"""THE table of datasets, and the way in: `open_dataset`.

To add a dataset, add a row; an opener is needed only for a new format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vitrail.data.dataset import ArraySplit, Dataset, Sizes, Split, take
from vitrail.data.formats.cifar import read_cifar
from vitrail.data.formats.digits import load_digits
from vitrail.data.formats.folder import open_folder
from vitrail.data.formats.hf_datasets import SCHEME as HF
from vitrail.data.formats.hf_datasets import open_hf
from vitrail.data.formats.idx import read_pair
from vitrail.data.formats.shards import Wanted
from vitrail.data.formats.webdataset import SCHEME as WDS
from vitrail.data.formats.webdataset import open_wds
from vitrail.data.splits import stratified
from vitrail.errors import VitrailError, did_you_mean
from vitrail.utils.download import Progress, cache_dir, fetch


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """A file to be had from the first of `urls` that answers, and the checksums of its content."""

    name: str
    urls: tuple[str, ...]
    md5: str
    sha256: str | None = None


Opener = Callable[["DatasetRow", Path | None, Progress | None], dict[str, ArraySplit]]


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """One dataset. size is (height, width); mean and std are those of the images that are not test images, on 0..1."""

    name: str
    opener: Opener
    class_names: tuple[str, ...]
    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_source: str
    licence: str
    citation: str
    files: tuple[DatasetFile, ...] = ()
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)  # split -> the files inside that hold it
    folder: str = ""  # the archive's top folder
    label_bytes: int = 1

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def open_dataset(
    data: str | Path,
    *,
    data_dir: str | Path | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    split_seed: int = 0,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Open a dataset by name, a folder of images, `wds:` shards (see wds.py) or an `hf-dataset:` (see hf.py).

    A name wins over a folder of the same name in the current directory; write "./digits" for the folder.
    data_dir: where a named dataset's files lie already. val_fraction is held out of train where there is no val split;
    test_fraction likewise, for folders with enough images (named datasets have their own test split).
    split_seed: which images are held out; it is no training seed. class_names: a model's classes, to which labels are
    then matched by name. progress: called with (done, total) bytes while downloading, or files while scanning a
    folder. Raises VitrailError.
    """
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise VitrailError(f"{name} must be at least 0 and below 1, not {value}")
    if val_fraction + test_fraction >= 1:
        raise VitrailError(f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on")
    row = DATASETS.get(str(data).lower()) if isinstance(data, str) else None
    # An evaluation's images may be of any of the model's classes; training needs two to tell apart.
    least = 2 if class_names is None else 1
    opener = next((SCHEMES[scheme] for scheme in SCHEMES if str(data).startswith(scheme)), None)
    if opener is not None:
        dataset = opener(str(data), Wanted(val_fraction, test_fraction, split_seed, least), progress)
    elif row is not None:
        dataset = _open_row(row, Path(data_dir) if data_dir else None, val_fraction, split_seed, progress)
    else:
        path = Path(data).expanduser()
        if not path.is_dir():
            hint = did_you_mean(str(data), DATASETS)
            what = "is a file, not a folder" if path.exists() else f"is neither a folder nor a known dataset{hint}"
            known = f"datasets: {', '.join(DATASETS)}; also wds: shards and hf-dataset: names"
            raise VitrailError(f"{data} {what}; {known}")
        dataset = open_folder(
            path,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            least_classes=least,
            progress=progress,
        )
    return dataset if class_names is None else dataset.relabel(class_names)


SCHEMES = {WDS: open_wds, HF: open_hf}


def lasting_data(data: str | Path) -> str:
    """`data` by a word that means the same from any folder: paths are written out, names and addresses stay."""
    word = str(data)
    for scheme in SCHEMES:
        if word.startswith(scheme):
            rest = word.removeprefix(scheme)
            path = os.path.expanduser(rest)
            local = scheme == WDS or path.startswith((".", "/")) or path.endswith(".parquet") or os.path.isdir(path)
            return scheme + os.path.abspath(path) if local and "://" not in rest else word
    return word if isinstance(data, str) and word.lower() in DATASETS else str(Path(data).expanduser().resolve())


def _open_row(
    row: DatasetRow, data_dir: Path | None, val_fraction: float, split_seed: int, progress: Progress | None
) -> Dataset:
    official = row.opener(row, data_dir, progress)
    train = official["train"]
    splits: dict[str, Split] = {"train": train}
    how = "train and test are the dataset's own"
    if val_fraction > 0:
        kept, held = stratified(train.labels, val_fraction, split_seed, "val")
        splits = {"train": take(train, kept), "val": take(train, held)}
        how += f"; val is {len(held)} of train's {len(train)} images, stratified, split seed {split_seed}"
    splits["test"] = official["test"]
    height, width = official["train"].images.shape[1:3]
    count = sum(len(part) for part in official.values())
    return Dataset(
        name=row.name,
        class_names=row.class_names,
        splits=splits,
        sizes=Sizes.of(np.tile(np.array([[height, width]], dtype=np.int64), (count, 1))),
        channels=row.channels,
        mean=row.mean,
        std=row.std,
        how_split=how,
    )


def _open_digits(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    return load_digits()


_DEBIAN = Path("/usr/share/datasets")  # Debian's package dataset-fashion-mnist


def _open_idx(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    names = [file.name for file in row.files]
    here = _idx_folder(
        names, [data_dir, data_dir / row.name] if data_dir else [_DEBIAN / row.name, cache_dir() / row.name]
    )
    if here is None:
        if data_dir:
            raise VitrailError(f"{data_dir} lacks some of {', '.join(names)}; without --data-dir they are downloaded")
        here = {f.name: fetch(f.urls, cache_dir() / row.name / f.name, md5=f.md5, progress=progress) for f in row.files}
    return {
        split: read_pair(here[images], here[labels], row.num_classes, f"{row.name}/{split}")
        for split, (images, labels) in row.splits.items()
    }


def _idx_folder(names: Sequence[str], folders: Sequence[Path]) -> dict[str, Path] | None:
    """The files in the first folder that has all of them, gzipped or plain."""
    for folder in folders:
        found = {}
        for name in names:
            for path in (folder / name, folder / name.removesuffix(".gz")):
                if path.is_file():
                    found[name] = path
                    break
        if len(found) == len(names):
            return found
    return None


def _open_cifar(row: DatasetRow, data_dir: Path | None, progress: Progress | None) -> dict[str, ArraySplit]:
    (file,) = row.files
    source: Path | None
    if data_dir:
        places = [data_dir / row.folder, data_dir / file.name, data_dir, data_dir / row.name / file.name]
        one = next(iter(row.splits["test"]))
        source = next((p for p in places if p.is_file() or (p / one).is_file()), None)
        if source is None:
            raise VitrailError(
                f"{data_dir} holds neither {file.name} nor {row.folder}; without --data-dir it is downloaded"
            )
    else:
        source = fetch(
            file.urls, cache_dir() / row.name / file.name, md5=file.md5, sha256=file.sha256, progress=progress
        )
    return read_cifar(source, row.splits, row.label_bytes, row.num_classes, row.name)


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

_KRIZHEVSKY = "Krizhevsky. Learning multiple layers of features from tiny images. 2009"
_PUBLISHED = "widely published for the 50,000 training images; not recomputed here, scripts/dataset_statistics.py does"

_ROWS = (
    DatasetRow(
        name="digits",
        opener=_open_digits,
        class_names=tuple("0123456789"),
        size=(8, 8),
        channels=1,
        mean=(0.3055,),
        std=(0.3761,),
        mean_source="scripts/dataset_statistics.py",
        licence="CC BY 4.0",
        citation="Alpaydin, Kaynak. Optical recognition of handwritten digits. UCI, 1998",
    ),
    DatasetRow(
        name="fashion-mnist",
        opener=_open_idx,
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
        mean_source="scripts/dataset_statistics.py",
        licence="MIT",
        citation="Xiao, Rasul, Vollgraf. Fashion-MNIST. arXiv:1708.07747",
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
    DatasetRow(
        name="cifar10",
        opener=_open_cifar,
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        size=(32, 32),
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        mean_source=_PUBLISHED,
        licence="none stated by its authors",
        citation=_KRIZHEVSKY,
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
        opener=_open_cifar,
        class_names=tuple(_CIFAR100_CLASSES.split()),
        size=(32, 32),
        channels=3,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        mean_source=_PUBLISHED,
        licence="none stated by its authors",
        citation=_KRIZHEVSKY,
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
