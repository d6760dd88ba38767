"""Swin alone: any image size, edges and padding, the explicit attention, patch merging."""

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import PatchMerging as TimmPatchMerging

from vitrail.layers import window
from vitrail.models.configs import SwinConfig
from vitrail.models.swin import PatchMerging, SwinBlock, SwinTransformer

SMALL: dict[str, Any] = {
    "patch_size": 2, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4, "num_classes": 5
}  # fmt: skip


def block(shifted: bool) -> SwinBlock:
    made = SwinBlock(8, 2, (4, 4), shifted, 0.0, SwinConfig(**SMALL)).eval().double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("size", [(4, 8), (5, 7), (3, 10)], ids=str)
def test_a_token_attends_only_within_its_window(size: tuple[int, int], shifted: bool) -> None:
    """By gradient: what a token gets depends on the tokens of its window, cut off at the edges of the image, and on
    no other: none from the far edge, which the cyclic shift puts beside it, and none of the padding."""
    layer = block(shifted)
    x = torch.randn(1, *size, 8, dtype=torch.double, requires_grad=True)
    out = layer(x)
    shift = [2 if shifted and s > 4 else 0 for s in size]
    for row in range(size[0]):
        for column in range(size[1]):
            (grad,) = torch.autograd.grad(out[0, row, column].sum(), x, retain_graph=True)
            feels = grad[0].abs().sum(-1) > 0
            expected = torch.tensor(
                [
                    [
                        (r - shift[0]) // 4 == (row - shift[0]) // 4 and (c - shift[1]) // 4 == (column - shift[1]) // 4
                        for c in range(size[1])
                    ]
                    for r in range(size[0])
                ]
            )
            assert torch.equal(feels, expected)


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (3, 10)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_block_equals_forward_with_weights(size: tuple[int, int], shifted: bool) -> None:
    layer = block(shifted)
    x = torch.randn(2, *size, 8, dtype=torch.double)
    with torch.no_grad():
        out, weights = layer.forward_with_weights(x)
        torch.testing.assert_close(layer(x), out)
    n = layer.windows(x).window[0] * layer.windows(x).window[1]
    assert weights.shape == (2 * len(layer.windows(x).gather) // n, 2, n, n)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 64), (1, 1), (7, 30)], ids=str)
def test_any_image_size_can_be_trained(size: tuple[int, int]) -> None:
    model = SwinTransformer(SwinConfig(img_size=(32, 32), **SMALL))
    x = torch.randn(2, 3, *size)
    features = model.forward_features(x)
    assert features.shape == (2, -(-size[0] // 4), -(-size[1] // 4), 16)
    logits = model.forward_head(features)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_built_for_a_small_size_has_small_windows() -> None:
    model = SwinTransformer(SwinConfig(img_size=(8, 32), **SMALL))
    assert [stage.blocks[0].attn.window for stage in model.layers] == [(4, 4), (2, 4)]


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 4)], ids=str)
def test_patch_merging_is_timms_and_pads_odd_sizes(size: tuple[int, int]) -> None:
    ours, theirs = PatchMerging(3, 1e-5), TimmPatchMerging(3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, *size, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_a_step_builds_no_window_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SwinTransformer(SwinConfig(img_size=(32, 32), **SMALL))
    x = torch.randn(1, 3, 36, 32)
    expected = model.eval()(x)
    monkeypatch.setattr(window, "_plan_windows", None)
    assert torch.equal(model(x), expected)


def test_half_precision_and_autocast() -> None:
    model = SwinTransformer(SwinConfig(img_size=(32, 32), drop_path_rate=0, **SMALL))
    x = torch.randn(2, 3, 36, 32)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x)
    mixed.float().sum().backward()
    torch.testing.assert_close(mixed.float(), expected, rtol=0.1, atol=0.02)
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.02)


def test_export_caches_no_fake_tensors() -> None:
    """Tracing runs on fake tensors, which must not be kept for later calls."""
    model = SwinTransformer(SwinConfig(img_size=(32, 32), **SMALL)).eval()
    x = torch.randn(1, 3, 36, 36)
    window._plans.clear()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_bias_tables_get_no_weight_decay() -> None:
    model = SwinTransformer(SwinConfig(**SMALL))
    assert len(model.no_weight_decay()) == 4
    assert all(name.endswith("attn.relative_position_bias_table") for name in model.no_weight_decay())
