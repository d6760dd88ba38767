"""Class names of published heads."""

import json
from functools import cache
from pathlib import Path


@cache
def label_names(labels: str | None) -> tuple[str, ...] | None:
    """The class names of "imagenet-1k" (torchvision's, all distinct) in the order of the head; None for other sets."""
    if labels != "imagenet-1k":
        return None
    return tuple(json.loads(Path(__file__).with_name("imagenet-1k.json").read_text(encoding="utf-8")))
