"""Training: `train`, and what it is made of. Importing this imports no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.training.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    if name != "train":
        raise AttributeError(f"module 'vitrail.training' has no attribute {name!r}")
    from vitrail.training.run import train

    return train
