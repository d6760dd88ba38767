"""The names of the classes that many published heads know."""

import json
from functools import cache
from pathlib import Path


@cache
def label_names(labels: str | None) -> tuple[str, ...] | None:
    """The names of a set of classes ("imagenet-1k"), in the order of the head's rows; None for a set that is not here.

    ImageNet's are torchvision's short forms, of which no two are equal.
    """
    if labels != "imagenet-1k":
        return None
    return tuple(json.loads(Path(__file__).with_name("imagenet-1k.json").read_text(encoding="utf-8")))
