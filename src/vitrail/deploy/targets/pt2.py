"""The model entry as a program of `torch.export`."""

import warnings
from pathlib import Path

import torch

from vitrail.classifier import Classifier
from vitrail.deploy.fold.fold import fold_model
from vitrail.deploy.graph import Outputs

MODEL = "model.pt2"


def write_pt2(classifier: Classifier, folder: Path) -> None:
    """Write model.pt2: `images` uint8 B H W C of the model's size -> logits B K, probabilities B K, features B F."""
    preprocess = classifier.preprocess
    module = Outputs(fold_model(classifier.model, preprocess), True).eval()
    example = torch.zeros(2, *preprocess.size, preprocess.channels, dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export uses functions of torch that are deprecated
        shapes = {"images": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=shapes), folder / MODEL)
