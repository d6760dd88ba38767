"""Preprocess: how an image becomes a model's input.

The same frozen record is used by evaluation, predict, embed and export, and is stored in the model folder. Its terms
and arithmetic are timm's (`create_transform` with is_training=False) and, for square inputs, those of torchvision's
classification presets. Importing this module imports neither torch, numpy nor Pillow.

Shapes: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vitrail.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from PIL import Image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MAX_SIDE = 8192  # pixels
_MIN_CROP_PCT = 0.05
_MAX_MEAN = 1e4  # on the scale 0..1, far beyond what images have
_LARGE = 1 << 24  # pixels of a resized image above which only the part that the crop keeps is computed
_REACH = 3  # source pixels, or resized ones if they are larger, on which a value depends on each side: lanczos's
_IN_CACHE = 1 << 18  # floats that one thread processes at a time: 1 MiB


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize, crop and normalise.

    size: (height, width) in pixels. mean, std: one number per channel, on the scale 0..1.
    crop_pct: the image is resized to floor(size / crop_pct), then center-cropped.
    crop_mode: "center" resizes the shorter side and crops the longer one; "squash" ignores the aspect ratio; "border"
    resizes the longer side and pads with the mean colour.
    channels: 3 (RGB) or 1 (grey); any other number for array inputs only.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    channels: int = 3

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.size) != 2 or not all(isinstance(x, int) and 0 < x <= _MAX_SIDE for x in self.size):
            raise ConfigError(
                f"preprocessing: size must be two integers (height, width) from 1 to {_MAX_SIDE}, not {self.size}"
            )
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if (value := getattr(self, name)) not in known:
                raise ConfigError(f"preprocessing: {name} {value!r} must be one of {', '.join(known)}")
        if not (isinstance(self.crop_pct, int | float) and _MIN_CROP_PCT <= self.crop_pct <= 1):
            raise ConfigError(f"preprocessing: crop_pct must be from {_MIN_CROP_PCT} to 1, not {self.crop_pct}")
        if self.channels < 1 or len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ConfigError(
                f"preprocessing: {self.channels} channels need {self.channels} values of mean and std, "
                f"not {len(self.mean)} and {len(self.std)}"
            )
        if not (all(abs(x) <= _MAX_MEAN for x in self.mean) and all(1 / _MAX_MEAN <= x <= _MAX_MEAN for x in self.std)):
            raise ConfigError(
                f"preprocessing: mean must be within {_MAX_MEAN:g} of 0 and std from {1 / _MAX_MEAN:g} to {_MAX_MEAN:g}"
            )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """One image, any Pillow mode -> float32 C H W, normalised. Raises BadImage."""
        import torch

        pixels = torch.from_numpy(self.crop(image)).permute(2, 0, 1)
        return self.normalize(pixels[None])[0].contiguous()

    def crop(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """The part that runs on the CPU: orientation, mode, resize and crop. Returns a new uint8 H W C array."""
        import numpy as np
        from PIL import Image

        from vitrail.images.convert import to_channels
        from vitrail.images.decode import bad_image_errors

        if self.channels not in (1, 3):
            raise ModelError(f"this model takes {self.channels} channels; image files have 1 or 3")
        with bad_image_errors():
            image = to_channels(image, self.channels)
            height, width = self._resized(image.height, image.width)
            if height * width > _LARGE:  # of a long and thin image
                image = self._resize_seen(image, height, width)
            elif (width, height) != image.size:
                image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
            return np.array(self._center_crop(image)).reshape(*self.size, self.channels)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The size after resizing and before cropping, with the rounding of timm or torchvision."""
        target_h, target_w = (math.floor(x / self.crop_pct) for x in self.size)
        if self.crop_mode == "squash":
            return target_h, target_w
        if self.crop_mode == "center" and target_h == target_w:  # torchvision's Resize(int) truncates the longer side
            if width <= height:
                return int(target_h * height / width), target_h
            return target_h, int(target_h * width / height)
        ratios = height / target_h, width / target_w
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))  # timm's ResizeKeepRatio

    def _resize_seen(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The part that the center crop keeps of the image resized to (height, width), without computing the rest."""
        from PIL import Image

        size, outer, inner = [], [], []
        for length, resized, crop in ((image.width, width, self.size[1]), (image.height, height, self.size[0])):
            scale, start, kept = length / resized, max(0, _crop_start(resized, crop)), min(resized, crop)
            low, high, reach = start * scale, (start + kept) * scale, _REACH * max(1.0, scale)
            # Cut out first: Pillow's box has single precision, too coarse for the coordinates of a long image.
            first, last = max(0, math.floor(low - reach)), min(length, math.ceil(high + reach))
            size.append(kept)
            outer.append((first, last))
            inner.append((low - first, min(high - first, last - first)))
        part = image.crop((outer[0][0], outer[1][0], outer[0][1], outer[1][1]))
        box = (inner[0][0], inner[1][0], inner[0][1], inner[1][1])
        return part.resize((size[0], size[1]), Image.Resampling[self.interpolation.upper()], box=box)

    def keeps(self, height: int, width: int) -> bool:
        """Whether `crop` leaves images of this size unchanged."""
        return (height, width) == self.size == self._resized(height, width)

    def _center_crop(self, image: Image.Image) -> Image.Image:
        """Center crop; a smaller image is padded (with the mean colour for "border", else black)."""
        from PIL import Image

        (height, width), (crop_h, crop_w) = (image.height, image.width), self.size
        if (height, width) == self.size:
            return image
        if crop_w > width or crop_h > height:
            color = tuple(round(255 * m) for m in self.mean) if self.crop_mode == "border" else (0,) * self.channels
            canvas = Image.new(
                image.mode, (max(width, crop_w), max(height, crop_h)), color if self.channels > 1 else color[0]
            )
            canvas.paste(image, (max(0, -_crop_start(width, crop_w)), max(0, -_crop_start(height, crop_h))))
            image = canvas
        top, left = max(0, _crop_start(height, crop_h)), max(0, _crop_start(width, crop_w))
        return image.crop((left, top, left + crop_w, top + crop_h))

    def crop_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """The rectangle (top, left, bottom, right) of an upright image that the model's input shows, in the image's
        pixels. It reaches outside of the image where the input is padded."""
        box = []
        for length, resized, crop in zip((height, width), self._resized(height, width), self.size, strict=True):
            start = _crop_start(resized, crop)
            box.append((start * length / resized, (start + crop) * length / resized))
        (top, bottom), (left, right) = box
        return top, left, bottom, right

    def normalize(self, batch: torch.Tensor) -> torch.Tensor:
        """(x / 255 - mean) / std in float32, on the batch's device. batch: B C H W, uint8 or float, in 0..255."""
        import torch

        scale, shift = _affine(self.mean, self.std, batch.device)
        if batch.dtype == torch.uint8:
            if batch.device.type == "cpu" and batch.numel() > (size := _IN_CACHE * torch.get_num_threads()):
                # In parts that stay in the processor's cache for all three passes.
                out = torch.empty(batch.shape)
                count = max(1, size * len(batch) // batch.numel())
                for source, part in zip(batch.split(count), out.split(count), strict=True):
                    part.copy_(source).mul_(scale).add_(shift)
                return out
            return batch.to(torch.float32).mul_(scale).add_(shift)
        return torch.addcmul(shift, batch.to(torch.float32), scale)

    def replace(self, **changes: Any) -> Preprocess:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_channels(self, channels: int) -> Preprocess:
        """A copy for another number of channels, each with the average mean and std of the present ones."""
        if channels == self.channels:
            return self
        mean, std = ((sum(values) / len(values),) * channels for values in (self.mean, self.std))
        return self.replace(channels=channels, mean=mean, std=std)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`. Raises ConfigError for an unknown key or an invalid value."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in record:
            if key not in known:
                raise ConfigError(f"preprocessing: unknown key {key!r}{did_you_mean(key, known)}")
        try:
            return cls(**record)
        except TypeError as error:
            raise ConfigError(f"preprocessing: {error}") from None

    def to_timm(self) -> dict[str, Any]:
        """The same settings as keys of timm's pretrained_cfg."""
        return {
            "input_size": [self.channels, *self.size],
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Preprocess:
        """From timm's pretrained_cfg; missing keys take timm's defaults."""
        channels, height, width = config.get("input_size", (3, 224, 224))
        record = {
            "size": (height, width),
            "channels": channels,
            "interpolation": config.get("interpolation") or "bicubic",
            "crop_pct": config.get("crop_pct") or 0.875,
            "crop_mode": config.get("crop_mode") or "center",
            "mean": config.get("mean") or IMAGENET_MEAN,
            "std": config.get("std") or IMAGENET_STD,
        }
        return cls.from_dict(record)


def _crop_start(length: int, crop: int) -> int:
    """Where a center crop begins along one side; below 0 by the padding before the image."""
    # Rounds half to even, as timm and torchvision do.
    return -((crop - length) // 2) if crop > length else round((length - crop) / 2)


@lru_cache(maxsize=64)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift), each 1 C 1 1, so that x * scale + shift normalises x in 0..255."""
    import torch

    def per_channel(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    scale = [1 / (255 * s) for s in std]
    return per_channel(scale), per_channel([-m / s for m, s in zip(mean, std, strict=True)])
