"""One set of published weights: where it comes from, on what terms, and how its images were prepared."""

from dataclasses import dataclass

from vitrail.images.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class WeightsRecord:
    """One row of `published.csv`.

    model: the catalog's name. tag: the name of these weights among the model's; timm's where timm has them.
    source: "hf:org/repo" or a URL. sha256: of the file, or as much of its beginning as the publisher states; None where
    the hub states it at the time of the download. top1: percent on ImageNet's validation images with this very
    preprocessing, as published; None where no such number is. labels: the set of classes that the head knows, such as
    "imagenet-1k"; None for a backbone. paper: arXiv's number.
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
        """The name of the set of classes, where it is one that many share."""
        return _LABELS.get(self.num_classes)

    @property
    def name(self) -> str:
        """timm's way to name them: model.tag."""
        return f"{self.model}.{self.tag}"


# ImageNet's whole hierarchy was published with and without its two topmost classes, and timm trimmed it by frequency.
_LABELS = {1000: "imagenet-1k", 21843: "imagenet-21k", 21841: "imagenet-22k", 11821: "imagenet-12k"}
