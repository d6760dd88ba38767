"""How many tokens each block may merge: Lee and Choi, "Lossless Token Merging Even Without Fine-Tuning in Vision
Transformers", 2025 (https://arxiv.org/abs/2505.15160), with numbers fixed by block, so that the exported graph has
fixed shapes.

Every block has a threshold of its own: pairs of tokens may merge whose keys' squared distance is at most a share of the
mean distance of all keys of that block. The number of such pairs per image, averaged over calibration images, is what
the block merges. The share is the same for all blocks, and the largest at which the predicted classes remain.

Shapes: n images, B batch, I channels, H W height and width, N tokens, C width, K classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.classifier import Classifier
from vitrail.errors import ConfigError, DataError, ModelError
from vitrail.images.convert import Pixels
from vitrail.inference.torch_runtime import autocast
from vitrail.layers.merging import Groups, find_pairs, first_groups, merge, spread
from vitrail.models.build import merged_model
from vitrail.models.vit import VisionTransformer

State = tuple[Tensor, Groups]  # tokens B N C, and what they stand for

_BATCH = 32
_STEPS = 10  # of the bisection
_RANGE = (2.0**-10, 4.0)  # of the share: nothing merges below, and all that can above


@dataclass(frozen=True)
class Merging:
    """What was chosen.

    schedule: patch tokens that each block merges. share: of the mean distance, at which pairs merge. loss: percent of
    the `images` whose predicted class changes; at most max_loss.
    """

    schedule: tuple[int, ...]
    share: float
    loss: float
    max_loss: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as `merging` in export.json."""
        return {**asdict(self), "schedule": list(self.schedule)}


def choose_merging(classifier: Classifier, images: Sequence[Pixels], max_loss: float = 0.5) -> Merging:
    """The schedule that merges most, of those with which at most `max_loss` percent of the images change class.

    So much of the accuracy on these images is lost at most. In float32, on the model's device.

    Args:
        classifier: with a ViT or DeiT that does not merge tokens yet.
        images: uint8 H W C, cropped for the model (`Preprocess.crop`); at least 100 / max_loss. Not those that the
            export is checked with. The tokens of all of them are in memory at once.
        max_loss: percentage points, above 0.

    Raises:
        ModelError: not a ViT or DeiT of this package, no classes, or it merges tokens already.
        ConfigError: max_loss is not above 0.
        DataError: too few images to measure such a loss.
    """
    depth = _depth(classifier)
    if not 0 < max_loss <= 100:
        raise ConfigError(f"the loss by merging must be above 0 and at most 100 points, not {max_loss:g}")
    if len(images) * max_loss < 100:
        raise DataError(
            f"{len(images)} images cannot show a loss of {max_loss:g} points: use at least {math.ceil(100 / max_loss)}"
        )
    trial = _Trial(classifier, images)
    best = Merging((0,) * depth, 0.0, 0.0, max_loss, len(images))
    low, high = _RANGE
    for _ in range(_STEPS):
        share = math.sqrt(low * high)
        schedule, loss = trial.run(share)
        if loss > max_loss:
            high = share
        else:
            low, best = share, Merging(schedule, share, loss, max_loss, len(images))
    return best


def merged_classifier(classifier: Classifier, schedule: Sequence[int]) -> Classifier:
    """The classifier with blocks that merge so many tokens each; the weights are shared."""
    return Classifier(
        merged_model(classifier.model, schedule).eval(),
        classifier.preprocess,
        classifier.class_names,
        architecture=classifier.architecture,
        precision=classifier.precision,
        notes=classifier.notes,
    )


def _depth(classifier: Classifier) -> int:
    """The number of blocks of a model that can merge tokens, and does not yet."""
    model = classifier.model
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"{classifier.architecture} cannot merge tokens: only a ViT or DeiT can")
    if any(model.config.merge):
        raise ModelError(f"{classifier.architecture} merges tokens already, as it was trained: export it as it is")
    if not classifier.class_names:
        raise ModelError(f"{classifier.architecture} has no classes by which a loss could be measured")
    return model.config.depth


class _Trial:
    """The model on the calibration images, with any thresholds."""

    def __init__(self, classifier: Classifier, images: Sequence[Pixels]) -> None:
        self.model = merged_model(classifier.model, (0,) * _depth(classifier)).eval()
        self.device = classifier.device
        classes, self.inputs = [], []
        with self._exact():
            for start in range(0, len(images), _BATCH):
                pixels = torch.from_numpy(np.stack(images[start : start + _BATCH])).to(self.device).permute(0, 3, 1, 2)
                batch = classifier.preprocess.normalize(pixels.contiguous())
                classes.append(self.model(batch).argmax(dim=1))
                self.inputs.append(self.model.embed(batch))
        self.classes = torch.cat(classes)

    def run(self, share: float) -> tuple[tuple[int, ...], float]:
        """The schedule at this share of the mean distance, and the percentage of images whose class changes."""
        model, schedule = self.model, []
        with self._exact():
            states = [(x, first_groups(x) if model.read_tokens is None else Groups()) for x in self.inputs]
            for index, block in enumerate(model.blocks):
                if index < model.config.merging_blocks:
                    r, states = _run_block(block, states, share)
                else:
                    r, states = 0, [block(x, model.read_tokens, groups) for x, groups in states]
                schedule.append(r)
            classes = [model.forward_head(model.norm(spread(x, groups))).argmax(dim=1) for x, groups in states]
        changed = int((torch.cat(classes) != self.classes).sum())
        return tuple(schedule), 100 * changed / len(self.classes)

    @contextmanager
    def _exact(self) -> Iterator[None]:
        with torch.inference_mode(), autocast(self.device, bf16=False):
            yield


def _run_block(block: Any, states: list[State], share: float) -> tuple[int, list[State]]:
    """One block on all images. The number of tokens that it merges is the mean number of pairs within its threshold."""
    attended, scales = [], []
    for x, groups in states:
        x, keys = block.attend(x, None, groups)
        patches = keys.mean(dim=1)[:, block.prefix :]
        scales.append(patches.var(dim=1, correction=0).sum(dim=1))  # half the mean squared distance of two tokens
        attended.append((x, groups, find_pairs(keys, block.prefix)))
    threshold = share * torch.cat(scales).mean()
    counts = torch.cat([(pairs.distance <= threshold).sum(dim=1) for *_, pairs in attended])
    r = min(int(counts.float().mean()), (attended[0][0].shape[1] - block.prefix) // 2)
    merged = (merge(x, groups, pairs, r, block.prefix) for x, groups, pairs in attended)
    return r, [(block.finish(x), groups) for x, groups in merged]
