"""Test-time augmentation: several views of each image, whose probabilities are averaged. For every runtime.

`flip`: the image and its mirror image. `crops`: the center and the four corners of the image at a larger size, the
"10-crop" of Krizhevsky et al., 2012 (https://proceedings.neurips.cc/paper/2012/hash/c399862d3b9d6b76c8436e924a68c45b-Abstract.html),
without mirror images.

Importing this imports no torch. Shapes: B batch, H W height and width of the model's input, C channels, K classes, V
views.
"""

import math
from collections.abc import Iterator

import numpy as np

from vitrail.errors import ConfigError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.inference.probabilities import log_softmax
from vitrail.inference.runtime import Images, Outputs, Runtime

VIEWS = {"flip": 2, "crops": 5}  # forward passes per image
_LARGEST_SHARE = 0.875  # of a side that a crop covers: ResNet's 224 of 256 pixels


class TtaRuntime:
    """A runtime that computes a kind of views of each image with another runtime and averages their probabilities.

    `logits` are log-probabilities: their softmax is the average. `features` are averaged. With crops, `preprocess`
    gives images that are larger than the model's input, by its crop fraction or by 1 / 0.875 if that is more.
    """

    def __init__(self, runtime: Runtime, kind: str) -> None:
        """Raises ConfigError if `kind` is neither "flip" nor "crops"."""
        forward_passes(kind)
        self.runtime = runtime
        self.kind = kind
        self.name, self.num_classes, self.num_features = runtime.name, runtime.num_classes, runtime.num_features
        self.default_batch_size = runtime.default_batch_size
        self.preprocess = enlarged(runtime.preprocess) if kind == "crops" else runtime.preprocess

    def logits(self, images: Images) -> Outputs:
        """uint8 B H W C to float32 B K."""
        views = [self.runtime.logits(view) for view in self._views(images)]
        with np.errstate(invalid="ignore"):  # the engine reports what is not finite
            together = np.logaddexp.reduce([log_softmax(view) for view in views]) - math.log(len(views))
        return np.asarray(together, np.float32)

    def features(self, images: Images) -> Outputs:
        """uint8 B H W C to float32 B F."""
        return np.asarray(np.mean([self.runtime.features(view) for view in self._views(images)], axis=0), np.float32)

    def fingerprint(self) -> str:
        return f"{self.runtime.fingerprint()}-{self.kind}"

    def _views(self, images: Images) -> Iterator[Images]:
        """uint8 B H W C each, contiguous."""
        if self.kind == "flip":
            yield images
            yield np.ascontiguousarray(images[:, :, ::-1])
            return
        height, width = self.runtime.preprocess.size
        below, right = images.shape[1] - height, images.shape[2] - width
        for top, left in ((round(below / 2), round(right / 2)), (0, 0), (0, right), (below, 0), (below, right)):
            yield np.ascontiguousarray(images[:, top : top + height, left : left + width])


def enlarged(preprocess: Preprocess) -> Preprocess:
    """The preprocessing of the images that crops are taken from."""
    share = min(preprocess.crop_pct, _LARGEST_SHARE)
    height, width = (math.floor(side / share) for side in preprocess.size)
    return preprocess.replace(size=(height, width), crop_pct=1.0)


def forward_passes(kind: str) -> int:
    """Per image. Raises ConfigError for an unknown kind."""
    if kind not in VIEWS:
        raise ConfigError(f"tta must be one of {', '.join(VIEWS)}, not {kind!r}{did_you_mean(kind, VIEWS)}")
    return VIEWS[kind]


def describe_cost(kind: str) -> str:
    """A line for the terminal."""
    passes = forward_passes(kind)
    return f"tta={kind}: {passes} forward passes per image, about {passes} times the time of one"
