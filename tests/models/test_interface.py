"""The interface of every family: head, dropout, stochastic depth, checkpointing, layer numbers, and training."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters

from tolerance import assert_near
from vitrail.layers.block import DropPath
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.pretrained.create import create_model

VIT = ViTConfig(patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5, img_size=(32, 32))
CONFIGS: dict[str, ModelConfig] = {
    "vit": VIT,
    "vit, average pooling": replace(VIT, global_pool="avg", fc_norm=True),
    "vit, stem": replace(VIT, stem="conv"),
    "deit": replace(VIT, dist_token=True),
    "swin": SwinConfig(
        patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5, img_size=(32, 32)
    ),
    "resnet": ResNetConfig(block="basic", layers=(1, 1, 1, 1), num_classes=5, img_size=(32, 32)),
    "bottleneck": ResNetConfig(block="bottleneck", layers=(1, 1, 1, 1), num_classes=5, img_size=(32, 32)),
    "convnext": ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5, img_size=(32, 32)),
}
every_family = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def logits_of(model: ImageModel, x: torch.Tensor) -> torch.Tensor:
    """In training a distilled model gives both heads' logits: their mean."""
    out = model(x)
    return torch.stack(out).mean(0) if isinstance(out, tuple) else out


def loss_of(model: ImageModel, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_of(model, x), torch.arange(len(x)) % 5)


@every_family
def test_head_can_be_replaced_and_removed(config: ModelConfig) -> None:
    model = build_model(config).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert pooled.shape == (2, model.num_features)
        assert model(x).shape == (2, 5)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7) == (2, model.num_classes)
        model.reset_classifier(0)
        assert_near(model(x), pooled)
        headless = build_model(replace(config, num_classes=0)).eval()
        headless.load_state_dict(model.state_dict())
        assert_near(headless(x), pooled)


@every_family
def test_forward_is_features_then_head(config: ModelConfig) -> None:
    model = build_model(config).eval()
    x = torch.randn(2, 3, 32, 32)
    assert_near(model(x), model.forward_head(model.forward_features(x)))
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_near(model.forward_pre_logits(x), pooled)


@every_family
def test_a_reset_head_keeps_the_dtype(config: ModelConfig) -> None:
    model = build_model(config).to(torch.bfloat16)
    model.reset_classifier(3)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@every_family
def test_dropout_before_the_head_only_in_training(config: ModelConfig) -> None:
    model = build_model(replace(config, drop_rate=0.5, drop_path_rate=0))
    features = model.eval().forward_features(torch.randn(2, 3, 32, 32))
    pooled = model.forward_head(features, pre_logits=True)
    model.train()
    dropped = model.forward_head(features, pre_logits=True)
    assert (dropped == 0).any()
    assert not (pooled == 0).all()
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), pooled)


@every_family
def test_drop_path_grows_over_all_blocks(config: ModelConfig) -> None:
    model = build_model(replace(config, drop_path_rate=0.4))
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.4)
    assert len(set(rates)) == max(model.layer_ids().values()) - 1  # one rate per block


@every_family
def test_checkpointing_gives_the_same_gradients(config: ModelConfig) -> None:
    model = build_model(config).train()
    x = torch.randn(4, 3, 32, 32)
    grads = []
    for enable in (False, True):
        torch.manual_seed(1)  # the same paths are dropped
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        loss_of(model, x).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@every_family
def test_every_block_is_checkpointed_in_training(config: ModelConfig) -> None:
    model = build_model(config)
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    def kept_by_a_step() -> int:
        nonlocal kept
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits_of(model, torch.randn(4, 3, 32, 32))
        return kept

    model.train()
    without = kept_by_a_step()
    model.set_grad_checkpointing()
    assert kept_by_a_step() < 0.6 * without
    model.set_grad_checkpointing(False)
    assert kept_by_a_step() == without


@every_family
def test_a_few_steps_overfit_four_images(config: ModelConfig) -> None:
    model = build_model(replace(config, drop_path_rate=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(4, 3, 32, 32)
    first = loss_of(model, x).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first


@every_family
def test_no_weight_decay_names_parameters(config: ModelConfig) -> None:
    model = build_model(config)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "swin_tiny_patch4_window7_224",
        "resnet18",
        "resnet50",
        "convnext_tiny",
    ],
)
def test_layer_numbers_are_timms(name: str) -> None:
    """Except the last norm of ViT and Swin: in timm it belongs to the last block, here to the head."""
    with torch.device("meta"):
        ours, theirs = create_model(name), timm.create_model(name)
    expected = group_parameters(theirs, theirs.group_matcher(coarse=False), reverse=True)
    last = max(expected.values())
    expected |= {"norm.weight": last, "norm.bias": last} if "norm.weight" in expected else {}
    assert ours.layer_ids() == expected


@every_family
def test_layer_numbers_cover_every_parameter_without_a_gap(config: ModelConfig) -> None:
    model = build_model(config)
    ids = model.layer_ids()
    assert list(ids) == [name for name, _ in model.named_parameters()]
    assert set(ids.values()) == set(range(max(ids.values()) + 1))
