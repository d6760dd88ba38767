"""The record of published weights: source, licence, checksum, accuracy and preprocessing."""

from dataclasses import dataclass

from vitrail.images.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """One row of `published.csv`.

    model: the name in the catalog. tag: timm's tag if timm has these weights. source: "hf:org/repo" or a URL.
    sha256: of the file, or its published first digits; None if the hub provides it. top1: published accuracy on
    ImageNet's validation images with this preprocessing, in percent. paper: arXiv number.
    """

    model: str
    tag: str
    source: str
    licence: str | None
    preprocess: Preprocess
    num_classes: int
    sha256: str | None = None
    top1: float | None = None
    paper: str | None = None

    @property
    def labels(self) -> str | None:
        """The set of classes, such as "imagenet-1k"; None for a backbone or other classes."""
        return _LABELS.get(self.num_classes)

    @property
    def name(self) -> str:
        """As in timm: model.tag."""
        return f"{self.model}.{self.tag}"


# The full ImageNet was published with and without its two top classes; timm's 12k are its most frequent classes.
_LABELS = {1000: "imagenet-1k", 21843: "imagenet-21k", 21841: "imagenet-22k", 11821: "imagenet-12k"}
