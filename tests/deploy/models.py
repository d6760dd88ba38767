"""Small models with random weights that make every fold matter, and images for them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vitrail.images.preprocess import Preprocess
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ModelConfig, ResNetConfig, SwinConfig, ViTConfig

_VIT = ViTConfig(embed_dim=32, depth=2, num_heads=4, patch_size=4, img_size=(16, 24), num_classes=5)
_SWIN = SwinConfig(embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, img_size=(64, 32), num_classes=5)
CONFIGS: dict[str, ModelConfig] = {
    "vit": _VIT,
    "vit without bias": replace(_VIT, qkv_bias=False),
    "vit without head": replace(_VIT, num_classes=0),
    "vit with convolutional stem": replace(_VIT, stem="conv"),
    "deit": replace(_VIT, dist_token=True),
    "deit with one head": replace(_VIT, dist_token=True, dist_head=False),
    "deit3": replace(_VIT, init_values=0.1, no_embed_class=True),
    "dinov2 with registers": replace(_VIT, init_values=0.1, reg_tokens=3, no_embed_class=True),
    "mean of patches": replace(_VIT, init_values=0.1, global_pool="avg", fc_norm=True),
    "mean without class token": replace(_VIT, global_pool="avg", class_token=False),
    "swin": _SWIN,
    "swin with padding": replace(_SWIN, depths=(2, 3, 2), num_heads=(2, 4, 4), img_size=(61, 90)),
    "resnet": ResNetConfig(layers=(1, 2), channels=(8, 16), num_classes=5, img_size=(33, 48)),
    "small resnet": ResNetConfig(
        block="basic", layers=(1, 1), channels=(8, 16), num_classes=5, small_stem=True, img_size=(17, 20)
    ),
    "convnext": ConvNeXtConfig(
        depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), num_classes=5, img_size=(65, 96), ls_init_value=0.5
    ),
}


def random_model(config: ModelConfig) -> ImageModel:
    """In evaluation mode, with no parameter or running statistic at the value that makes its layer the identity."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.2)
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.weight.data += 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model


def preprocess_of(config: ModelConfig) -> Preprocess:
    return Preprocess(size=config.img_size, mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def random_pixels(config: ModelConfig, count: int = 2) -> Tensor:
    """B I H W, float64 in 0..255."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, config.in_chans, *config.img_size), generator=generator).double()
