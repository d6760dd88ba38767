"""Parameter groups: all parameters, once, at the rates and decays that timm gives them."""

from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vitrail.errors import ConfigError, ModelError
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.training.config.schema import TrainConfig, make_config
from vitrail.training.engine.optimizer import (
    clip_gradients,
    describe_groups,
    make_optimizer,
    parameter_groups,
    set_rates,
)

VIT = ViTConfig(img_size=(32, 32), embed_dim=32, depth=3, num_heads=2, num_classes=5)
SWIN = SwinConfig(
    img_size=(32, 32), patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=5
)
RESNET = ResNetConfig(block="basic", layers=(1, 1, 1, 1), num_classes=5)
CONVNEXT = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5)


def config(**keys: Any) -> TrainConfig:
    return make_config(keys)


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(rate, weight decay) of each parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"] * g.get("lr_scale", 1.0), g["weight_decay"]) for g in groups for p in g["params"]}


@pytest.mark.parametrize("kind", [VIT, SWIN, RESNET, CONVNEXT], ids=lambda kind: type(kind).__name__)
def test_every_parameter_is_in_one_group(kind: ModelConfig) -> None:
    model = build_model(kind)
    groups = parameter_groups(model, config(layer_decay=0.7, head_lr=1e-2))
    counted = [id(p) for group in groups for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())
    for name, (_, decay) in by_name(model, groups).items():
        plain = name.endswith("bias") or ".norm" in name or "pos_embed" in name or "token" in name
        assert not (plain and decay), name
    assert len({group["name"] for group in groups}) == len(groups)


def test_frozen_parameters_are_left_out() -> None:
    model = build_model(VIT)
    model.blocks.requires_grad_(False)
    names = by_name(model, parameter_groups(model, config()))
    assert names
    assert not [name for name in names if name.startswith("blocks")]
    with pytest.raises(ModelError, match="frozen"):
        parameter_groups(model.requires_grad_(False), config())


def test_equals_timm() -> None:
    """Weight decay and layer decay of a ViT, parameter by parameter."""
    ours = build_model(VIT)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    assert by_name(ours, parameter_groups(ours, config(lr=1.0, weight_decay=0.1))) == {
        name: (1.0, decay)
        for name, (_, decay) in by_name(
            theirs,
            [
                g | {"lr": 1.0}
                for g in param_groups_weight_decay(theirs, 0.1, no_weight_decay_list=theirs.no_weight_decay())
            ],
        ).items()
    }
    expected = param_groups_layer_decay(theirs, 0.1, theirs.no_weight_decay(), layer_decay=0.5)
    expected_by_name = by_name(theirs, [g | {"lr": 1.0} for g in expected])
    for model in (ours, theirs):  # a guest is asked in timm's way
        found = by_name(model, parameter_groups(model, config(lr=1.0, weight_decay=0.1, layer_decay=0.5)))
        assert found.keys() == expected_by_name.keys(), type(model)
        for name, pair in expected_by_name.items():
            if name.startswith("norm.") and model is ours:
                # With the head, as in BEiT's own code; timm puts the last norm with the last block.
                assert found[name] == (1.0, 0.0)
                continue
            assert found[name] == pytest.approx(pair), name


def test_head_and_backbone_rates() -> None:
    model = build_model(VIT)
    rates = by_name(model, parameter_groups(model, config(lr=1.0, backbone_lr=0.1, head_lr=10.0)))
    assert {name for name, (rate, _) in rates.items() if rate == 10.0} == {"head.weight", "head.bias"}
    assert {rate for name, (rate, _) in rates.items() if not name.startswith("head")} == {0.1}


def test_layer_decay_needs_layers() -> None:
    with pytest.raises(ConfigError, match="layer_decay=1"):
        parameter_groups(nn.Linear(2, 2), config(layer_decay=0.9))
    parameter_groups(nn.Linear(2, 2), config())


def test_rates_are_set_and_groups_described() -> None:
    model = build_model(VIT)
    groups = parameter_groups(model, config(lr=1e-3, head_lr=1e-2, weight_decay=0.1))
    optimizer = make_optimizer(groups, config(betas=(0.9, 0.95)).optimizer)
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    set_rates(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-4, 5e-3}
    lines = describe_groups(groups)
    assert len(lines) == 4
    assert sum(int(line.split(" parameters")[0].split()[-1].replace(",", "")) for line in lines) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize("largest", [1e-3, 1e3])
def test_clipping_is_torchs(largest: float) -> None:
    models = [build_model(VIT) for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        model.head.bias.grad = None
    clip_gradients(list(models[0].parameters()), largest)
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), largest)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=0)


def test_a_step_is_adamw() -> None:
    """By hand, from the paper's algorithm 2, on one weight that decays and one that does not."""
    model = nn.Linear(1, 1)
    weight, bias = model.weight.item(), model.bias.item()
    optimizer = make_optimizer(
        parameter_groups(model, config(lr=0.1, weight_decay=0.3)), config(betas=(0.9, 0.99)).optimizer
    )
    model(torch.tensor([[2.0]])).sum().backward()  # gradients 2 and 1; the first step of Adam is their sign
    optimizer.step()
    assert model.weight.item() == pytest.approx(weight * (1 - 0.1 * 0.3) - 0.1, abs=1e-6)
    assert model.bias.item() == pytest.approx(bias - 0.1, abs=1e-6)
