"""The settings of augmentation: the section `augment` of a run's config.

Importing this imports no torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from vitrail.utils.settings import Amount, Ascending, Count, Pair, Positive, Range, Settings, Share


class Augment(Settings):
    """Augmentation of training images; off by default.

    Crops are taken when an image is read (crop.py), repeats are part of the epoch's order (sampling.py), and the rest
    runs in batches on the device (augment.py).
    """

    crop_scale: Annotated[tuple[Share, Share] | None, Pair] = Field(
        None, description="share of the image's area that a random crop takes, from and to; none: no random crop"
    )
    crop_ratio: Annotated[tuple[Positive, Positive], Pair] = Field(
        (3 / 4, 4 / 3), description="width to height of a random crop"
    )
    flip: Share = Field(0.0, description="probability of a horizontal flip")
    vflip: Share = Field(0.0, description="probability of a vertical flip")
    pad_shift: int = Field(0, ge=0, description="largest shift in each direction, in whole pixels")
    rotate: float = Field(0.0, ge=0, le=180, description="largest rotation in each direction, in degrees")
    shear: float = Field(0.0, ge=0, lt=90, description="largest shear in each direction, in degrees")
    zoom: Range = Field((1.0, 1.0), description="smallest and largest scale; above 1 is larger")
    shift: Share = Field(0.0, description="largest shift in each direction, as a share of the side")
    edge: Literal["black", "edge", "reflect"] = Field("black", description="what fills pixels from outside the image")
    rand_augment: float = Field(0.0, ge=0, le=10, description="magnitude of RandAugment, 0 to 10; 0: off")
    rand_augment_ops: Count = Field(2, le=32, description="RandAugment operations per image, each with probability 0.5")
    rand_augment_std: Amount = Field(0.5, description="standard deviation of the magnitude of RandAugment")
    brightness: Amount = Field(0.0, description="largest relative change of brightness")
    contrast: Amount = Field(0.0, description="largest relative change of contrast")
    saturation: Amount = Field(0.0, description="largest relative change of saturation; colour images only")
    erase: Share = Field(0.0, description="probability of random erasing (Zhong et al., 2017)")
    erase_area: Annotated[tuple[Positive, Share], Pair, Ascending] = Field(
        (0.02, 1 / 3), description="share of the image's area that is erased, from and to"
    )
    erase_ratio: Range = Field((0.3, 1 / 0.3), description="height to width of the erased rectangle, from and to")
    erase_fill: Literal["noise", "mean"] = Field("noise", description="what the erased rectangle is filled with")
    mixup: Amount = Field(0.0, description="alpha of mixup's beta distribution (Zhang et al., 2017); 0: off")
    cutmix: Amount = Field(0.0, description="alpha of CutMix's beta distribution (Yun et al., 2019); 0: off")
    mix_prob: Share = Field(1.0, description="probability that a pair of images is mixed, if mixup or cutmix is on")
    switch: Share = Field(0.5, description="probability of CutMix instead of mixup where both are on")
    repeats: Count = Field(
        1, description="repeated augmentation: views of an image per batch, of fewer images per epoch; 1: off"
    )

    @property
    def mixes(self) -> bool:
        """Whether targets are soft."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0

    @property
    def affine(self) -> bool:
        """Whether pixels are interpolated, rather than moved by whole pixels."""
        return bool(self.rotate or self.shear or self.shift) or self.zoom != (1.0, 1.0)

    @property
    def active(self) -> list[str]:
        """Names of the settings that differ from their defaults."""
        return [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
