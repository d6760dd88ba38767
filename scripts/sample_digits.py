"""Write a few of the digits' test images as PNG files, to have something to predict: sample_digits.py FOLDER."""

import sys
from pathlib import Path

from vitrail.data.catalog import open_dataset


def main(folder: Path, count: int = 6) -> None:
    folder.mkdir(parents=True)
    dataset = open_dataset("digits")
    test = dataset.splits["test"]
    for index in range(count):
        label = dataset.class_names[test.labels[index]]
        test.image(index).save(folder / f"test-{index}-is-a-{label}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
