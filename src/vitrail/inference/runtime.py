"""The protocol of a runtime, which computes logits or features of a batch of images.

Inputs and outputs are NumPy arrays, so that not every runtime imports torch.
Shapes: B batch, H W height and width, C channels, K classes, F features.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from vitrail.images.preprocess import Preprocess

Images = npt.NDArray[np.uint8]  # B H W C, resized and cropped by Preprocess.crop
Outputs = npt.NDArray[np.float32]  # B K logits or B F features


class Runtime(Protocol):
    """A model on a device. Its methods may be called from several threads at the same time.

    name: the architecture or file. preprocess: how images are cropped (by the engine) and normalised (by the runtime).
    num_classes: K, 0 for a model without a head. num_features: F. default_batch_size: used if the caller gives none, so
    that predict, embed and evaluate compute the same batches.
    """

    @property
    def name(self) -> str: ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def num_features(self) -> int: ...

    @property
    def default_batch_size(self) -> int: ...

    def logits(self, images: Images) -> Outputs:
        """Logits B K. Normalisation is part of the call."""
        ...

    def features(self, images: Images) -> Outputs:
        """The input of the classification head, B F."""
        ...

    def fingerprint(self) -> str:
        """A hex digest that changes with the weights, the architecture, the preprocessing and the precision."""
        ...


def default_batch_size(preprocess: Preprocess, device_type: str) -> int:
    """Images in a batch: about 2^24 pixels on CUDA and 2^20 elsewhere, between 8 and 1,024 images."""
    pixels = 2**24 if device_type == "cuda" else 2**20
    return max(8, min(1024, pixels // (preprocess.size[0] * preprocess.size[1])))
