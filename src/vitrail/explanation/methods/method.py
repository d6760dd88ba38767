"""What a way to explain is: a function from a model and images to maps, and what is true of its maps.

Shapes: B batch, C channels, H W height and width of the model's input, h w height and width of a map, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from vitrail.models.base import ImageModel
from vitrail.models.convnext import ConvNeXt
from vitrail.models.resnet import ResNet
from vitrail.models.swin import SwinTransformer
from vitrail.models.vit import VisionTransformer

FAMILIES: dict[str, type[ImageModel] | tuple[type[ImageModel], ...]] = {
    "vit": VisionTransformer,  # ViT, DeiT, DINOv2
    "swin": SwinTransformer,
    "cnn": (ResNet, ConvNeXt),
}
MERGED = "merged vit"  # a ViT that merges tokens, and so has no attention weights or features of single patches
EXTERNAL = "external"  # a model of timm or torchvision that is not of this package


@dataclass(frozen=True)
class Request:
    """What a method is given. It changes nothing of it.

    model: in evaluation mode, parameters shared with the user's model. images: normalised, B C H W, in the model's
    dtype. target: from logits B K to the number to explain for each image, B. block, head: which attention block and
    head to use, where a method draws single ones; negative numbers count from the end, None for the method's default.
    """

    model: nn.Module
    images: Tensor
    target: Callable[[Tensor], Tensor]
    block: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    compute: returns maps B h w, float32, without a gradient. A cell of the map is a square of ceil(H / h) pixels; the
    last row and column may reach over the edge of the image, where a model pads. families: keys of FAMILIES,
    MERGED or EXTERNAL. class_specific: whether the map depends on the target. signed: whether there may be
    values below 0, evidence against the target. reference: paper or source. negated_if_ruled_out: whether maps, which
    have no sign of their own, are multiplied by -1 for a class that the model rules out (see `Target.ruled_out`).
    """

    name: str
    compute: Callable[[Request], Tensor]
    families: tuple[str, ...]
    class_specific: bool
    signed: bool
    reference: str
    selects_block: bool = False  # reads `block`
    selects_head: bool = False  # reads `head`
    negated_if_ruled_out: bool = False


def family_of(model: nn.Module) -> str:
    """The model's key in FAMILIES, MERGED or EXTERNAL."""
    if isinstance(model, VisionTransformer) and any(model.config.merge):
        return MERGED
    return next((name for name, classes in FAMILIES.items() if isinstance(model, classes)), EXTERNAL)
