"""Folded models that merge tokens: the same tokens are merged, with every fold and with none."""

from typing import Any

import pytest
import torch

from tolerance import assert_near
from vitrail.deploy.fold.fold import FOLDS, fold_model
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model, merged_model
from vitrail.models.configs import ViTConfig

KINDS: dict[str, dict[str, Any]] = {
    "token": {},
    "average": {"global_pool": "avg", "class_token": False, "fc_norm": True},
    "distilled": {"dist_token": True},
    "registers": {"reg_tokens": 2, "init_values": 0.3},
    "stem": {"stem": "conv"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_model_merges_the_same_tokens(kind: str) -> None:
    torch.manual_seed(0)
    size = (48, 64)
    model = build_model(
        ViTConfig(img_size=size, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=5, **KINDS[kind])
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 3 or "pos" in name:
            torch.nn.init.normal_(parameter, std=0.3, mean=float("norm" in name and "weight" in name))
    merged, preprocess = merged_model(model, 8), Preprocess(size=size)
    pixels = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        expected = merged(preprocess.normalize(pixels))
        for skip in ((), ("last_block",), tuple(FOLDS)):
            assert_near(fold_model(merged, preprocess, skip)(pixels.float())[0], expected)
