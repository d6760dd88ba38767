"""Integrated gradients and occlusion against captum."""

from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from captum.attr import IntegratedGradients, Occlusion
from torch import Tensor, nn

from tolerance import assert_near
from vitrail.explanation.methods.method import Request
from vitrail.explanation.methods.perturbation import integrated_gradients, occlusion, occlusion_window
from vitrail.models.build import build_model
from vitrail.models.configs import ResNetConfig, SwinConfig, ViTConfig

VIT = ViTConfig(patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, img_size=(32, 48))
SWIN = SwinConfig(
    patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=5, img_size=(25, 42)
)
RESNET = ResNetConfig(block="basic", layers=(1, 1), channels=(8, 16), num_classes=5, img_size=(33, 50))


@pytest.fixture(scope="module", params=["vit", "deit", "swin", "resnet", "timm", "torchvision"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    configs = {"vit": VIT, "deit": replace(VIT, dist_token=True), "swin": SWIN, "resnet": RESNET}
    torch.manual_seed(0)
    created: nn.Module
    if request.param in configs:
        created = build_model(configs[request.param])
    elif request.param == "timm":
        created = timm.create_model("test_vit", pretrained=False, num_classes=5, img_size=32)
    else:
        created = torchvision.models.resnet18(num_classes=5)
    for parameter in created.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
    return created.eval()


@pytest.fixture
def images(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, *(model.config.img_size if hasattr(model, "config") else (32, 32)))


def pair(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 1]


def predicted(logits: Tensor) -> Tensor:
    return logits.max(dim=1).values


def test_integrated_gradients_against_captum(model: nn.Module, images: Tensor) -> None:
    ours = integrated_gradients(Request(model, images, pair))
    theirs = IntegratedGradients(lambda x: pair(model(x))).attribute(images, n_steps=50)
    assert_near(ours, theirs.sum(dim=1).float(), 1e-4)
    ours = integrated_gradients(Request(model, images, predicted))
    theirs = IntegratedGradients(model).attribute(images, target=model(images).argmax(1), n_steps=50)
    assert_near(ours, theirs.sum(dim=1).float(), 1e-4)


@torch.no_grad()
def test_occlusion_against_captum(model: nn.Module, images: Tensor) -> None:
    height, width = images.shape[2:]
    window = occlusion_window(model, height, width)
    shape = (3, window, window)
    for target, options in (
        (predicted, {"target": model(images).argmax(1)}),
        (pair, {}),
    ):
        ours = occlusion(Request(model, images, target))
        forward = model if options else lambda x: pair(model(x))
        theirs = Occlusion(forward).attribute(images, shape, strides=shape, perturbations_per_eval=64, **options)
        pixels = ours.repeat_interleave(window, 1).repeat_interleave(window, 2)[:, :height, :width]
        assert_near(pixels, theirs[:, 0], 1e-4)


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        ((224, 224), 16, 16),
        ((224, 224), 14, 14),
        ((384, 384), 16, 32),
        ((32, 512), 16, 32),
        ((224, 224), None, 14),
        ((225, 225), None, 15),
        ((33, 33), None, 3),
        ((9, 100), None, 9),
        ((4, 4), None, 1),
    ],
)
def test_windows_are_told_by_the_map(size: tuple[int, int], patch: int | None, expected: int) -> None:
    model = build_model(replace(VIT, patch_size=patch, img_size=size)) if patch else nn.Identity()
    window = occlusion_window(model, *size)
    assert window == expected
    rows = -(-size[0] // window)
    assert -(-size[0] // rows) == window


def test_the_memory_of_a_forward_is_bounded() -> None:
    model, sizes = build_model(VIT).eval(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for batch in (1, 5, 20):
        for method in (occlusion, integrated_gradients):
            sizes.clear()
            method(Request(model, torch.randn(batch, 3, 32, 48), predicted))
            assert max(sizes) == max(batch, 16 // batch * batch)


def test_the_integral_adds_up_to_the_difference_from_the_mean_colour() -> None:
    model, images = build_model(VIT).eval(), torch.randn(2, 3, 32, 48)
    sums = integrated_gradients(Request(model, images, pair)).sum(dim=(1, 2))
    with torch.no_grad():
        assert_near(sums, pair(model(images)) - pair(model(torch.zeros_like(images))), 1e-3)
