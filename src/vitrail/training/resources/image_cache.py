"""Whether decoded images are kept on the disk, how much of them, and how the loaders of a run read them."""

import math

from vitrail.data.cache.pixel_cache import Say, room, words
from vitrail.data.cache.readers import Read, image_sizes, longest_short_side, reader, stored_bytes
from vitrail.data.dataset import Dataset
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import TrainConfig, byte_count


def settle_cache(config: TrainConfig, dataset: Dataset, preprocess: Preprocess) -> tuple[TrainConfig, list[str]]:
    """The config with the cache's size in place of "auto", and what was settled, in a line for the plan.

    The size is settled once: random crops are cut from images that are stored no larger than needed, so a run with a
    cache sees other pixels than one without, and `cache` may not change when it goes on.
    """
    if config.cache == "off" or config.probe:
        return config.model_copy(update={"cache": "off"}), []
    if image_sizes(dataset.split("train")) is None:
        line = [] if config.cache == "auto" else ["cache   off: there is nothing to decode"]
        return config.model_copy(update={"cache": "off"}), line
    total = sum(_bytes(config, dataset, preprocess).values())
    if config.cache == "auto":
        if config.epochs is not None and config.epochs <= 1:
            return config.model_copy(update={"cache": "off"}), ["cache   off: every image is read once"]
        if total > (free := room()):
            why = f"decoded, the images take {words(total)}, and half of the free disk is {words(free)}"
            return config.model_copy(update={"cache": "off"}), [f"cache   off: {why}; cache=20GB keeps a part"]
        config = config.model_copy(update={"cache": f"{math.ceil(total / 1e6)}MB"})
    limit = byte_count(config.cache)
    kept = words(total) if total <= limit else f"{words(limit)} of {words(total)}"
    side = longest_short_side(preprocess)
    shrunk = f", shorter sides of at most {side} pixels," if config.crop_scale else ""
    return config, [f"cache   {kept} of decoded images{shrunk} kept on the disk for later epochs and runs"]


def cached_readers(config: TrainConfig, dataset: Dataset, preprocess: Preprocess, say: Say) -> dict[str, Read]:
    """How "train" and "val" are read where the run has a cache; nothing where it has none."""
    if config.cache == "off":
        return {}
    readers, left = {}, byte_count(config.cache)
    said: set[str] = set()

    def say_once(line: str) -> None:
        """A full disk concerns all splits alike."""
        if line not in said:
            said.add(line)
            say(line)

    for name, count in _bytes(config, dataset, preprocess).items():
        whole = name == "train" and config.crop_scale is not None
        readers[name] = reader(dataset.split(name), preprocess, left, say_once, whole=whole)
        left = max(0, left - count)
    return readers


def _bytes(config: TrainConfig, dataset: Dataset, preprocess: Preprocess) -> dict[str, int]:
    """What each split that is read again and again takes."""
    return {
        name: stored_bytes(dataset.split(name), preprocess, whole=name == "train" and config.crop_scale is not None)
        for name in ("train", "val")
        if name in dataset.splits
    }
