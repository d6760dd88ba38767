"""A model as a backbone: images to the feature maps of chosen stages, with timm's interface of `features_only=True`.

Shapes: B batch, I channels of the image, H W height and width of the image, C h w those of a map.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vitrail.models.base import ImageModel, choose_stages
from vitrail.models.configs import ViTConfig


class FeatureInfo:
    """What the chosen maps are, in their order: channels, stride and module."""

    def __init__(self, rows: Sequence[dict[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = list(rows)
        self.out_indices = tuple(out_indices)

    def channels(self) -> list[int]:
        return [row["num_chs"] for row in self.get_dicts()]

    def reduction(self) -> list[int]:
        """Pixels of the image for each of the map, along a side."""
        return [row["reduction"] for row in self.get_dicts()]

    def module_name(self) -> list[str]:
        return [row["module"] for row in self.get_dicts()]

    def get_dicts(self) -> list[dict[str, Any]]:
        return [self.info[index] for index in self.out_indices]


class FeatureMaps(nn.Module):
    """Images B I H W to a list of maps B C h w. What the maps do not need is removed from `model`.

    out_indices: stages, see `ImageModel.forward_intermediates`; None: the last three blocks of a ViT, all stages of
    other models, as in timm.

    Raises:
        ModelError: an index out of range.
    """

    def __init__(self, model: ImageModel, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        self.default_cfg = self.pretrained_cfg = model.pretrained_cfg
        if out_indices is None and isinstance(model.config, ViTConfig):
            out_indices = min(3, model.num_stages)
        self.out_indices = choose_stages(model.num_stages, out_indices)
        self.feature_info = FeatureInfo(model.feature_info, self.out_indices)
        model.prune_intermediate_layers(self.out_indices, prune_norm=True)  # its maps are not normalised
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.model.forward_intermediates(x, self.out_indices, intermediates_only=True)
        return maps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `ImageModel.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)
