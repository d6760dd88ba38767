"""The same ViT or DeiT with another number of merged tokens."""

from collections.abc import Sequence

import torch
from torch import nn

from vitrail.errors import ModelError
from vitrail.models.build import build_model, configure
from vitrail.models.vit import VisionTransformer


def merged_model(model: nn.Module, merge: float | Sequence[int]) -> VisionTransformer:
    """`model` with merged tokens, in its mode, with the same parameters (shared, not copied).

    merge: patch tokens that each block merges, by block; or a number, as in `ViTConfig.even_merge`; 0 for none.

    Raises:
        ModelError: not a ViT or DeiT of this package, or more tokens than can be merged.
    """
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"{type(model).__name__} cannot merge tokens: use a ViT or DeiT of vitrail")
    schedule = merge if isinstance(merge, int | float) else tuple(merge)
    config = configure(model.config, merge=schedule, num_classes=model.num_classes)
    with torch.device("meta"):
        merged = build_model(config)
    merged.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    assert isinstance(merged, VisionTransformer)
    return merged.train(model.training)
