"""A small classifier of digits for the tests, trained for a few seconds."""

from functools import cache

import torch
import torch.nn.functional as F

from vitrail.classifier import Classifier
from vitrail.data.catalog import open_dataset
from vitrail.data.dataset import ArraySplit
from vitrail.images.preprocess import Preprocess
from vitrail.pretrained.create import create_model

DIGITS = tuple("0123456789")
PREPROCESS = Preprocess(size=(8, 8), mean=(0.3055,), std=(0.3761,), channels=1)


@cache
def _trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = _untrained().model
    split = open_dataset("digits").split("train")
    assert isinstance(split, ArraySplit)
    images = PREPROCESS.normalize(torch.from_numpy(split.images)[:, None])
    labels = torch.from_numpy(split.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(len(labels), (128,))
        loss = F.cross_entropy(model.train()(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def _untrained() -> Classifier:
    model = create_model("vit_nano_patch2_8", in_chans=1, num_classes=10, depth=2)
    return Classifier(model, PREPROCESS, DIGITS, architecture="vit_nano_patch2_8")


def digits_vit() -> Classifier:
    """Nine of ten test images are classified correctly, or more."""
    classifier = _untrained()
    classifier.model.load_state_dict(_trained())
    classifier.model.eval()
    return classifier


def outlier_vit(factor: float = 1e4) -> Classifier:
    """The same function with an outlier in the input of every attention projection: one channel of the values is
    multiplied by `factor`, and its weights in the projection are divided by it. With one scale for the whole tensor, 8
    bits leave nothing of the other channels."""
    classifier = digits_vit()
    with torch.no_grad():
        for block in classifier.model.blocks:  # type: ignore[union-attr]
            width = block.attn.proj.in_features
            block.attn.qkv.weight[2 * width] *= factor
            block.attn.qkv.bias[2 * width] *= factor
            block.attn.proj.weight[:, 0] /= factor
    return classifier
