"""Whether decoded images are kept on the disk, how much of them, and how the loaders of a run read them."""

import math

from vitrail.data.cache.pixel_cache import Log, room
from vitrail.data.cache.readers import ReadImage, cache_size, image_sizes, max_short_side, reader
from vitrail.data.dataset import Dataset
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import TrainConfig, byte_count
from vitrail.utils.text import format_bytes


def settle_cache(config: TrainConfig, dataset: Dataset, preprocess: Preprocess) -> tuple[TrainConfig, list[str]]:
    """The config with the cache's size in place of "auto", and what was settled, in a line for the plan.

    The size is settled once: random crops are cut from images that are stored no larger than needed, so a run with a
    cache sees other pixels than one without, and `cache` may not change when it goes on.
    """
    if config.io.cache == "off" or config.model.probe:
        return config.updated({"cache": "off"}), []
    if image_sizes(dataset.split("train")) is None:
        line = [] if config.io.cache == "auto" else ["cache   off: there is nothing to decode"]
        return config.updated({"cache": "off"}), line
    total = sum(_bytes(config, dataset, preprocess).values())
    if config.io.cache == "auto":
        if config.schedule.epochs is not None and config.schedule.epochs <= 1:
            return config.updated({"cache": "off"}), ["cache   off: every image is read once"]
        if total > (free := room()):
            why = f"decoded, the images take {format_bytes(total)}, and half of the free disk is {format_bytes(free)}"
            return config.updated({"cache": "off"}), [f"cache   off: {why}; cache=20GB keeps a part"]
        config = config.updated({"cache": f"{math.ceil(total / 1e6)}MB"})
    limit = byte_count(config.io.cache)
    kept = format_bytes(total) if total <= limit else f"{format_bytes(limit)} of {format_bytes(total)}"
    side = max_short_side(preprocess)
    shrunk = f", shorter sides of at most {side} pixels," if config.augment.crop_scale else ""
    return config, [f"cache   {kept} of decoded images{shrunk} kept on the disk for later epochs and runs"]


def cached_readers(config: TrainConfig, dataset: Dataset, preprocess: Preprocess, say: Log) -> dict[str, ReadImage]:
    """How "train" and "val" are read where the run has a cache; nothing where it has none."""
    if config.io.cache == "off":
        return {}
    readers, left = {}, byte_count(config.io.cache)
    said: set[str] = set()

    def say_once(line: str) -> None:
        """A full disk concerns all splits alike."""
        if line not in said:
            said.add(line)
            say(line)

    for name, count in _bytes(config, dataset, preprocess).items():
        whole = name == "train" and config.augment.crop_scale is not None
        readers[name] = reader(dataset.split(name), preprocess, left, say_once, whole=whole)
        left = max(0, left - count)
    return readers


def _bytes(config: TrainConfig, dataset: Dataset, preprocess: Preprocess) -> dict[str, int]:
    """What each split that is read again and again takes."""
    crops = config.augment.crop_scale is not None
    return {
        name: cache_size(dataset.split(name), preprocess, whole=name == "train" and crops)
        for name in ("train", "val")
        if name in dataset.splits
    }
