"""Values of the settings that are written in words: sizes, batch sizes, trackers."""

import re

from pydantic import BeforeValidator

from vitrail.errors import did_you_mean
from vitrail.training.config.threads import ThreadPlan
from vitrail.utils.settings import none_or
from vitrail.utils.text import one_line

TRACKERS = ("tensorboard", "wandb", "trackio")


def byte_count(size: str) -> int:
    """ "4GB", "500 MB" or "1.5TB" to bytes. Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,15}\.?[0-9]{0,15}) *([KMGT]?)B?", size.strip().upper())
    if not found:
        raise ValueError("neither auto nor off nor a size such as 4GB")
    return int(float(found[1]) * 1000 ** ("", "K", "M", "G", "T").index(found[2]))


def _cache(value: object) -> object:
    """auto, off, or a size; true and false stand for auto and off."""
    if isinstance(value, bool):
        return "auto" if value else "off"
    text = str(value).strip().lower()
    if text in ("auto", "off"):
        return text
    return "off" if none_or(text) is None or byte_count(text) == 0 else str(value).strip()


def _batch_size(value: object) -> object:
    """auto stands for 0."""
    return 0 if isinstance(value, str) and value.strip().lower() == "auto" else value


def _trackers(value: object) -> object:
    """ "tensorboard, wandb", or a list of such names, as one string with commas; "none" for no name."""
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        return value
    names = [name.strip().lower() for name in value if none_or(name) is not None]
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {one_line(repr(name), 80)}{did_you_mean(name, TRACKERS)}")
    return ",".join(dict.fromkeys(names)) or "none"


def _auto(value: object) -> object:
    """auto stands for None."""
    return None if isinstance(value, str) and value.strip().lower() == "auto" else none_or(value)


def _threads(value: object) -> object:
    """A number, or text that `ThreadPlan` reads, as text."""
    return value if isinstance(value, bool) else str(ThreadPlan.parse("none" if value is None else str(value)))


CacheSize, BatchSize, TrackerNames, Threads, Auto = (
    BeforeValidator(check) for check in (_cache, _batch_size, _trackers, _threads, _auto)
)
