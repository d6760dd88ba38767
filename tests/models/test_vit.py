"""ViT alone: the pruned last block, image sizes, tokens, initial weights."""

from functools import partial
from typing import Any

import pytest
import timm.models.vision_transformer as timm_vit
import torch
from torch import nn

from tolerance import assert_near, assert_same_gradients
from vitrail.errors import ModelError
from vitrail.models.configs import ViTConfig
from vitrail.models.vit import Block, VisionTransformer

SMALL: dict[str, Any] = {
    "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": (32, 32)
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_pruned_last_block_is_exact_in_value_and_gradient(checkpointing: bool) -> None:
    """Against the head on all tokens, in float64."""
    model = VisionTransformer(ViTConfig(init_values=0.2, reg_tokens=2, **SMALL)).double().train()
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(3, 3, 32, 32, dtype=torch.double, requires_grad=True)
    inputs = [x, *model.parameters()]
    pruned, full = model(x), model.forward_head(model.forward_features(x))
    assert_same_gradients(pruned, full, inputs)


def test_the_last_block_computes_the_class_token_alone() -> None:
    model = VisionTransformer(ViTConfig(**SMALL))
    rows: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    model(torch.randn(1, 3, 32, 32))
    assert rows == [17, 1]


@pytest.mark.parametrize("size", [(30, 32), (32, 31)])
def test_image_size_must_be_a_multiple_of_the_patch_size(size: tuple[int, int]) -> None:
    model = VisionTransformer(ViTConfig(**SMALL))
    with pytest.raises(ModelError, match=f"{size[0]}x{size[1]} .*patch size 8.*32x32"):
        model(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": False}, "needs class_token=True"),
        ({"dist_token": True, "reg_tokens": 1}, "reg_tokens=0"),
        ({"in_chans": 0}, "at least 1"),
        ({"num_classes": -1}, "at least 0"),
    ],
)
def test_inconsistent_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTConfig(**SMALL | options)


def test_first_weights_are_the_papers() -> None:
    model = VisionTransformer(ViTConfig(embed_dim=192, num_heads=3, depth=1, reg_tokens=4))
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.0176, rel=0.05)
    assert 0 < model.cls_token.abs().max() < 1e-5
    assert (model.head.bias == 0).all()
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}


def test_logits_depend_on_positions_and_pixels() -> None:
    model = VisionTransformer(ViTConfig(**SMALL)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(x), model(x.flip(3)), atol=1e-6)


def test_positions_dropout_only_in_training() -> None:
    model = VisionTransformer(ViTConfig(pos_drop_rate=0.5, **SMALL))
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_block_is_timms(init_values: float | None) -> None:
    ours = Block(0.0, ViTConfig(embed_dim=12, num_heads=3, mlp_ratio=2.5, init_values=init_values))
    theirs = timm_vit.Block(
        12, 3, mlp_ratio=2.5, qkv_bias=True, init_values=init_values, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12)
    assert_near(ours(x), theirs(x))


def test_a_block_with_fewer_queries_is_exact_in_its_gradients_too() -> None:
    block = Block(0.0, ViTConfig(embed_dim=12, num_heads=3, init_values=0.3)).double()
    x = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    inputs = [x, *block.parameters()]
    full, pruned = block(x)[:, :2], block(x, 2)
    assert_same_gradients(pruned, full, inputs)
