"""The cache of decoded images: its size on disk, and how the loaders read through it."""

import functools
import math

from vitrail.data.cache.pixel_cache import Log, max_total_size
from vitrail.data.cache.readers import ReadImage, cache_size, cached_reader, max_short_side
from vitrail.data.dataset import Dataset
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import TrainConfig
from vitrail.training.config.values import byte_count
from vitrail.utils.text import format_bytes


def settle_cache(config: TrainConfig, dataset: Dataset, preprocess: Preprocess) -> tuple[TrainConfig, list[str]]:
    """The config with a size in place of cache=auto, and a line for the plan.

    Random crops are cut from reduced images if there is a cache, so training with a cache sees other pixels than
    without, and `cache` may not change on resume.
    """
    if config.io.cache == "off" or config.model.probe:
        return config.updated({"cache": "off"}), []
    total = sum(_bytes(config, dataset, preprocess).values())
    if not total:
        line = [] if config.io.cache == "auto" else ["cache   off: the dataset has no encoded images"]
        return config.updated({"cache": "off"}), line
    if config.io.cache == "auto":
        if config.schedule.epochs is not None and config.schedule.epochs <= 1:
            return config.updated({"cache": "off"}), ["cache   off: each image is read only once"]
        if total > (free := max_total_size()):
            why = f"decoded images take {format_bytes(total)}, and half of the free disk space is {format_bytes(free)}"
            return config.updated({"cache": "off"}), [f"cache   off: {why}; cache=20GB stores a part"]
        config = config.updated({"cache": f"{math.ceil(total / 1e6)}MB"})
    limit = byte_count(config.io.cache)
    size = format_bytes(total) if total <= limit else f"{format_bytes(limit)} of {format_bytes(total)}"
    reduced = f", shorter sides of at most {max_short_side(preprocess)} pixels," if config.augment.crop_scale else ""
    return config, [f"cache   {size} of decoded images{reduced} kept on the disk for later epochs and runs"]


def cached_readers(config: TrainConfig, dataset: Dataset, preprocess: Preprocess, log: Log) -> dict[str, ReadImage]:
    """Functions that read "train" and "val" through the cache; none for a split that has no encoded images."""
    if config.io.cache == "off":
        return {}
    readers, left = {}, byte_count(config.io.cache)
    log_once = functools.cache(log)  # the splits may have the same problem, such as a full disk
    for name, count in _bytes(config, dataset, preprocess).items():
        if not count:  # a split of objects in memory, beside one of files
            continue
        random_crop = name == "train" and config.augment.crop_scale is not None
        readers[name] = cached_reader(dataset.split(name), preprocess, left, log_once, random_crop=random_crop)
        left = max(0, left - count)
    return readers


def _bytes(config: TrainConfig, dataset: Dataset, preprocess: Preprocess) -> dict[str, int]:
    """The size of the decoded images of each split that is read in every epoch."""
    crops = config.augment.crop_scale is not None
    return {
        name: cache_size(dataset.split(name), preprocess, random_crop=name == "train" and crops)
        for name in ("train", "val")
        if name in dataset.splits
    }
