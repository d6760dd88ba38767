"""Grad-CAM against pytorch-grad-cam, in every family, and on models of timm and torchvision."""

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
import pytest
import timm
import torch
import torchvision
from pytorch_grad_cam import GradCAM
from torch import Tensor, nn

from tolerance import assert_near
from vitrail.errors import ModelError
from vitrail.explanation.methods.gradcam import gradcam
from vitrail.explanation.methods.method import Request
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig

VIT = ViTConfig(patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5, img_size=(32, 48))
SWIN = SwinConfig(
    patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5, img_size=(32, 48)
)
RESNET = ResNetConfig(block="basic", layers=(1, 1, 1, 2), num_classes=5, img_size=(64, 96))
CONVNEXT = ConvNeXtConfig(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5, img_size=(64, 96))


def random_model(config: ModelConfig) -> ImageModel:
    """With weights large enough that every layer matters."""
    model = build_model(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn_like(value)
            value.copy_(1.5 * value[0].numel() ** -0.5 * noise if value.dim() > 1 else value + 0.1 * noise)
    return model


def target(logits: Tensor) -> Tensor:
    """The predicted class: with a class that the model sees no evidence for, the map may be zero everywhere."""
    return logits.max(dim=1).values


def from_tokens(prefix: int, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda x: x[:, prefix:].transpose(1, 2).unflatten(2, grid)


def reference(model: nn.Module, layer: nn.Module, images: Tensor, reshape: Callable[[Tensor], Tensor] | None) -> Tensor:
    """pytorch-grad-cam's map at the size of the image, each scaled to 0..1."""
    with GradCAM(model, [layer], reshape_transform=reshape) as cam:
        return torch.from_numpy(cam(images, None))


def scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Our maps as pytorch-grad-cam returns them: to 0..1, resized by OpenCV, and to 0..1 again."""
    images = []
    for image in maps.numpy():
        image = (image - image.min()) / (1e-7 + image.max() - image.min())
        image = cv2.resize(image, size[::-1])
        images.append((image - image.min()) / (1e-7 + image.max() - image.min()))
    return torch.from_numpy(np.float32(images))


CASES = {
    "vit": (VIT, lambda m: m.blocks[1].norm2, from_tokens(1, (4, 6))),
    "vit, average pooling": (
        replace(VIT, global_pool="avg", fc_norm=True),
        lambda m: m.blocks[2].norm2,
        from_tokens(1, (4, 6)),
    ),
    "vit, registers": (
        replace(VIT, reg_tokens=4, no_embed_class=True, init_values=1.0),
        lambda m: m.blocks[1].norm2,
        from_tokens(5, (4, 6)),
    ),
    "deit, two tokens": (replace(VIT, dist_token=True), lambda m: m.blocks[1].norm2, from_tokens(2, (4, 6))),
    "swin": (SWIN, lambda m: m.norm, lambda x: x.permute(0, 3, 1, 2)),
    "resnet": (RESNET, lambda m: m.layer4[-1], None),
    "convnext": (CONVNEXT, lambda m: m.stages[-1].blocks[-1], None),
}


@pytest.mark.parametrize(("config", "layer", "reshape"), CASES.values(), ids=CASES)
def test_against_pytorch_grad_cam(
    config: ModelConfig,
    layer: Callable[[ImageModel], nn.Module],
    reshape: Callable[[Tensor], Tensor] | None,
) -> None:
    model, images = random_model(config), torch.randn(3, 3, *config.img_size)
    maps = gradcam(Request(model, images, target))
    assert maps.min() >= 0
    assert maps.max() > 0
    assert not maps.requires_grad
    assert_near(scaled(maps, config.img_size), reference(model, layer(model), images, reshape), 1e-4)


TIMM = {
    "resnet": ("resnet10t", {}, lambda m: m.layer4, None),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "img_size": 64, "window_size": 4},
        lambda m: m.norm,
        lambda x: x.permute(0, 3, 1, 2),
    ),
    "class token": (
        "vit_tiny_patch16_224",
        {"embed_dim": 24, "depth": 3, "img_size": 64},
        lambda m: m.blocks[1].norm2,
        from_tokens(1, (4, 4)),
    ),
    "average pooling, without class token": (
        "vit_tiny_patch16_224",
        {"embed_dim": 24, "depth": 2, "img_size": 64, "class_token": False, "global_pool": "avg"},
        lambda m: m.blocks[1].norm2,
        from_tokens(0, (4, 4)),
    ),
}


@pytest.mark.parametrize(("name", "options", "layer", "reshape"), TIMM.values(), ids=TIMM)
def test_models_of_timm(
    name: str, options: dict[str, object], layer: Callable[[nn.Module], nn.Module], reshape: object
) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    for module in model.modules():  # timm sets the last norm of a residual branch to zero
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    images = torch.randn(2, 3, 64, 64)
    maps = gradcam(Request(model, images, target))
    assert maps.max() > 0
    assert_near(scaled(maps, (64, 64)), reference(model, layer(model), images, reshape), 1e-4)


TORCHVISION = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=5), lambda m: m.layer4, None),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 1], [4, 4], num_classes=5),
        lambda m: m.permute,
        None,
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(64, 16, 3, 2, 24, 48, num_classes=5),
        lambda m: m.encoder.layers[1].ln_2,
        from_tokens(1, (4, 4)),
    ),
}


@pytest.mark.parametrize(("create", "layer", "reshape"), TORCHVISION.values(), ids=TORCHVISION)
def test_models_of_torchvision(
    create: Callable[[], nn.Module], layer: Callable[[nn.Module], nn.Module], reshape: object
) -> None:
    model = create().eval()
    for parameter in model.parameters():  # the ViT's head starts at zero
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 64, 64)
    maps = gradcam(Request(model, images, target))
    assert maps.max() > 0
    assert_near(scaled(maps, (64, 64)), reference(model, layer(model), images, reshape), 1e-4)


def test_models_without_a_feature_map_are_refused_by_name() -> None:
    mixer = timm.models.MlpMixer(patch_size=32, embed_dim=512, num_blocks=1, num_classes=5).eval()
    with pytest.raises(ModelError, match=r"MlpMixer.*1x49x512, from norm.*occlusion"):
        gradcam(Request(mixer, torch.randn(1, 3, 224, 224), target))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    with pytest.raises(ModelError, match="Sequential"):
        gradcam(Request(linear, torch.randn(1, 3, 8, 8), target))
    with pytest.raises(ModelError, match="two blocks"):
        gradcam(Request(build_model(replace(VIT, depth=1)).eval(), torch.randn(1, 3, 32, 48), target))


@pytest.mark.parametrize("config", [VIT, SWIN, RESNET, CONVNEXT], ids=lambda config: type(config).__name__)
def test_frozen_models_and_no_gradient_outside(config: ModelConfig) -> None:
    model, images = random_model(config), torch.randn(2, 3, *config.img_size)
    expected = gradcam(Request(model, images, target))
    model.requires_grad_(False)
    assert_near(gradcam(Request(model, images, target)), expected)
    with torch.no_grad():
        assert_near(gradcam(Request(model, images, target)), expected)
    with torch.inference_mode():
        assert_near(gradcam(Request(model, images + 0, target)).clone(), expected)
    assert_near(gradcam(Request(model, images[1:], target)), expected[1:])


@pytest.mark.parametrize("config", [VIT, SWIN, RESNET, CONVNEXT], ids=lambda config: type(config).__name__)
def test_bfloat16(config: ModelConfig) -> None:
    model, images = random_model(config), torch.randn(2, 3, *config.img_size)
    expected = gradcam(Request(model, images, target))
    maps = gradcam(Request(model.bfloat16(), images.bfloat16(), target))
    assert maps.dtype == torch.float32
    assert torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1] > 0.9
