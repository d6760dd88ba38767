"""Means and standard deviations of the datasets, as they stand in vitrail.data.catalog.

    python scripts/dataset_statistics.py digits fashion-mnist
    python scripts/dataset_statistics.py cifar10 --data-dir ~/Downloads

They are taken over all pixels of the images that are not test images, a channel, on the scale 0..1, to four places.
"""

import argparse
from pathlib import Path

import numpy as np

from vitrail.data.catalog import DATASETS, open_dataset
from vitrail.data.dataset import ArraySplit


def statistics(name: str, data_dir: Path | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, stds) of a dataset's train and val images together."""
    dataset = open_dataset(name, data_dir=data_dir, val_fraction=0)
    train = dataset.splits["train"]
    assert isinstance(train, ArraySplit)
    levels = train.images.reshape(-1, train.channels)
    means, stds = [], []
    for channel in range(train.channels):
        # Exact: from how often each of the 256 levels occurs.
        count = np.bincount(levels[:, channel], minlength=256) / len(levels)
        level = np.arange(256) / 255
        mean = float(count @ level)
        means.append(round(mean, 4))
        stds.append(round(float(np.sqrt(count @ (level - mean) ** 2)), 4))
    return tuple(means), tuple(stds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(DATASETS))
    parser.add_argument("--data-dir", type=Path, help="where the files lie already")
    args = parser.parse_args()
    for name in args.names:
        mean, std = statistics(name, args.data_dir)
        row = DATASETS[name]
        same = "as in the catalog" if (mean, std) == (row.mean, row.std) else f"the catalog has {row.mean} {row.std}"
        print(f"{name}: mean={mean} std={std}  ({same})")


if __name__ == "__main__":
    main()
