"""The same networks in timm and in transformers."""

from typing import Any

from torch import Tensor, nn

import benchmarks.oracles  # noqa: F401  # before timm is imported, which happens in the functions below
from vitrail.layers.embed import ConvStem
from vitrail.models.configs import ModelConfig, SwinConfig, ViTConfig


def timm_twin(name: str, config: ModelConfig) -> nn.Module:
    """The model of `config` in timm, whose name there is `name`; a convolutional stem is given to it."""
    import timm
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    if not isinstance(config, ViTConfig) or config.stem == "patch":
        model: nn.Module = timm.create_model(name, num_classes=config.num_classes)
        return model

    class Stem(ConvStem):
        """Our stem in the interface that timm asks of an `embed_layer`."""

        def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any) -> None:
            super().__init__(patch_size, in_chans, embed_dim, config.stem_depth)
            self.num_patches = (img_size // patch_size) ** 2

        def forward(self, x: Tensor) -> Tensor:
            """In torch's own memory order, as the layers are commonly written."""
            return self.proj(self.convs(x)).flatten(2).transpose(1, 2)

    return TimmViT(
        img_size=config.img_size[0],
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        num_classes=config.num_classes,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        class_token=config.class_token,
        global_pool=config.global_pool,
        fc_norm=config.fc_norm,
        embed_layer=Stem,
    )


def transformers_twin(config: ModelConfig) -> nn.Module | None:
    """The model of `config` in transformers, with its fused attention where it has that; None where it has no such."""
    import transformers

    common = {"num_labels": config.num_classes, "image_size": config.img_size[0], "num_channels": config.in_chans}
    match config:
        case ViTConfig() if config.stem == "patch":
            words = transformers.ViTConfig(
                hidden_size=config.embed_dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.num_heads,
                intermediate_size=int(config.embed_dim * config.mlp_ratio),
                patch_size=config.patch_size,
                hidden_dropout_prob=0.0,
                **common,
            )
            return Logits(transformers.ViTForImageClassification(words))
        case SwinConfig():
            words = transformers.SwinConfig(
                embed_dim=config.embed_dim,
                depths=list(config.depths),
                num_heads=list(config.num_heads),
                window_size=config.window_size,
                drop_path_rate=config.drop_path_rate,
                **common,
            )
            return Logits(transformers.SwinForImageClassification(words))
    return None


class Logits(nn.Module):
    """A model of transformers that gives its logits, as everybody else's does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(pixel_values=images).logits
