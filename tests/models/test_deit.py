"""DeiT with its distillation token: two outputs in training, their mean in inference."""

import torch

from tolerance import assert_near, assert_same_gradients
from vitrail.models.configs import ViTConfig
from vitrail.models.deit import DistilledVisionTransformer


def small() -> DistilledVisionTransformer:
    return DistilledVisionTransformer(
        ViTConfig(patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=(32, 32), dist_token=True)
    )


def test_both_heads_in_training_and_their_mean_in_inference() -> None:
    model = small()
    x = torch.randn(2, 3, 32, 32)
    first, second = model.train()(x)
    assert first.shape == second.shape == (2, 5)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model.eval()(x), (first + second) / 2)


def test_each_head_reads_its_own_token() -> None:
    model = small().train()
    x = torch.randn(2, 3, 32, 32)
    first, second = model(x)
    tokens = model.forward_features(x)
    assert_near(first, model.head(tokens[:, 0]))
    assert_near(second, model.head_dist(tokens[:, 1]))


def test_the_pruned_last_block_is_exact_in_value_and_gradient() -> None:
    model = small().double().train()
    x = torch.randn(2, 3, 32, 32, dtype=torch.double, requires_grad=True)
    inputs = [x, *model.parameters()]
    pruned, full = torch.stack(model(x)), torch.stack(model.forward_heads(model.forward_features(x)))
    assert_same_gradients(pruned, full, inputs)


def test_reset_classifier_replaces_both_heads() -> None:
    model = small()
    model.reset_classifier(7)
    first, second = model.train()(torch.randn(2, 3, 32, 32))
    assert first.shape == second.shape == (2, 7)
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "dist_token"}
