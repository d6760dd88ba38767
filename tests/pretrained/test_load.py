"""Models built for what a source holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.layers.patch_embed import resample_patch_embed
from transformers import DeiTConfig, DeiTForImageClassification

import vitrail
from vitrail.errors import WeightsError
from vitrail.pretrained.create import create_model

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32}


def test_a_deit_of_transformers_with_one_head(tmp_path: Path) -> None:
    """It has the distillation token and no head for it: the class token's head decides alone."""
    config = DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=4,
    )  # fmt: skip
    theirs = DeiTForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "DeiTImageProcessor", "size": {"height": 32, "width": 32}, "do_center_crop": false, '
        '"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3}'
    )
    ours = vitrail.load(tmp_path)
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(ours.model(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    again = vitrail.load(ours.save(tmp_path / "ours"))
    with torch.no_grad():
        torch.testing.assert_close(again.model(x), ours.model(x), rtol=0, atol=0)


def test_another_patch_size_and_image_size(tmp_path: Path) -> None:
    old = create_model("vit_tiny_patch16_224", num_classes=3, patch_size=8, **SMALL)
    save_file(old.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="do not match the model"):  # not the catalog's row as it is
        create_model("vit_tiny_patch16_224", weights=tmp_path / "model.safetensors")
    new = create_model(
        "vit_tiny_patch16_224", weights=tmp_path / "model.safetensors", patch_size=4, **{**SMALL, "img_size": (32, 48)}
    )
    expected = resample_patch_embed(old.patch_embed.proj.weight.detach(), [4, 4])
    torch.testing.assert_close(new.patch_embed.proj.weight.detach(), expected, rtol=1e-5, atol=1e-5)
    assert new.pos_embed.shape == (1, 1 + 8 * 12, 24)
    assert new.eval()(torch.zeros(1, 3, 32, 48)).shape == (1, 3)
