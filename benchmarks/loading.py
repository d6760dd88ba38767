"""JPEGs of 500x375 into normalised training batches: ours, and torchvision's ImageFolder in a DataLoader.

Both: 224 pixels, random resized crop (bilinear), mirror images, normalised float32 batches of 64, two workers. The
photographs are scikit-learn's and scikit-image's, cut out and resized differently a few hundred times, quality 90.

torchvision's pipeline is that of its references (crop, mirror, ToTensor, Normalize); "v2" is the fastest that its
documentation names without its own image decoder: v2's transforms on uint8 tensors. An epoch of ours is a first one
(images are decoded and kept), a later one (they come from the cache), or one without a cache.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

import benchmarks.oracles  # noqa: F401
from benchmarks.measure import Comparison, interleave, publish
from vitrail.data.augment.augment import augment
from vitrail.data.augment.settings import Augment
from vitrail.data.cache.readers import cached_reader
from vitrail.data.catalog import open_dataset
from vitrail.data.loader import TrainLoader
from vitrail.images.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

SIZE, BATCH, WORKERS = 224, 64, 2
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def write_photographs(folder: Path, count: int) -> None:
    """JPEGs of 500x375, in four classes."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    sources = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    sources += [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    draw = np.random.default_rng(0)
    for number in range(count):
        source = sources[number % len(sources)]
        height, width = source.shape[:2]
        w = int(draw.uniform(0.6, 1.0) * min(width, height * 4 / 3))
        h = w * 3 // 4
        top, left = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1)
        image = Image.fromarray(np.ascontiguousarray(source[top : top + h, left : left + w]))
        path = folder / f"class{number % 4}" / f"{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def torchvision_epoch(folder: Path, *, tensors: bool) -> Callable[[], int]:
    """A call that goes once through the folder and gives the number of images."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    if tensors:
        transform: Any = v2.Compose(
            [
                v2.PILToTensor(),
                v2.RandomResizedCrop(SIZE, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    else:
        transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
    loader = DataLoader(
        ImageFolder(str(folder), transform),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,  # its processes are started once, in the warm-up
    )

    def run() -> int:
        return sum(len(images) for images, _ in loader)

    return run


class Ours:
    """Epochs of our loader. `forget` makes the next one a first one."""

    def __init__(self, folder: Path, *, cached: bool) -> None:
        self.split = open_dataset(folder, val_fraction=0.0, test_fraction=0.0).split("train")
        self.preprocess = Preprocess(size=(SIZE, SIZE), interpolation="bilinear")
        self.cached = cached
        self.number = 0
        self.forget()

    def forget(self) -> None:
        """Begin with no decoded image, as if nobody had seen these images before."""
        with tempfile.TemporaryDirectory() as empty:  # its files last while they are open
            os.environ["VITRAIL_CACHE"] = empty
            read = None
            if self.cached:
                read = cached_reader(self.split, self.preprocess, 1 << 40, print, random_crop=True)
        self.loader = TrainLoader(
            self.split,
            self.preprocess,
            batch_size=BATCH,
            workers=WORKERS,
            crop_scale=SCALE,
            crop_ratio=RATIO,
            read=read,
        )

    def epoch(self) -> int:
        """As `train` does it: batches from the loader; mirror images and normalising in one pass over a batch."""
        count = 0
        for batch in self.loader.epoch(self.number):
            images, _ = augment(
                batch.images,
                batch.labels,
                4,
                batch.keys,
                config=Augment(flip=0.5),
                preprocess=self.preprocess,
                seed=0,
                epoch=self.number,
            )
            count += len(images)
        self.number += 1
        return count

    def first_epoch(self) -> int:
        """An epoch that decodes every image and keeps it."""
        self.loader.close()
        self.forget()
        return self.epoch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=640)
    asked = parser.parse_args()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; for both sides
    torch.set_num_threads(1)  # beside two workers: more would only wait for a core
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, asked.images)
        publish("loading", compare(folder, asked.rounds), images=asked.images)


def compare(folder: Path, rounds: int) -> list[Comparison]:
    """First, later and uncached epochs against torchvision's usual pipeline, and later ones against its fastest."""
    kept, plain = Ours(folder, cached=True), Ours(folder, cached=False)
    usual, tensors = torchvision_epoch(folder, tensors=False), torchvision_epoch(folder, tensors=True)
    kept.epoch()
    note = "seconds of one epoch; images/s is its whole batches over them"
    pairs = (
        ("first epoch, nothing cached", kept.first_epoch, ("torchvision", usual)),
        ("first epoch, nothing cached", kept.first_epoch, ("torchvision v2", tensors)),
        ("later epoch, from the cache", kept.epoch, ("torchvision", usual)),
        ("later epoch, from the cache", kept.epoch, ("torchvision v2", tensors)),
        ("cache=off", plain.epoch, ("torchvision", usual)),
    )
    return [
        interleave(f"{what}, 2 workers", ("vitrail", ours), theirs, rounds=rounds, warmup=1, note=note)
        for what, ours, theirs in pairs
    ]


if __name__ == "__main__":
    main()
