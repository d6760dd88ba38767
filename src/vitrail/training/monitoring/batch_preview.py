"""--show-batch: an image of the first training batch after cropping, augmentation and mixing, with its labels.

Shapes: B images, C channels, H W height and width, K classes.
"""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vitrail.errors import ConfigError
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.session import Session
from vitrail.utils.files import atomic_write_bytes, user_path
from vitrail.utils.settings import format_value
from vitrail.utils.text import printable

_COLUMNS = 8
_MAX_IMAGES = 64
_MAX_LARGE_IMAGES = 32  # images above _CELL pixels
_CELL = 112  # small images are enlarged by an integer factor, up to this side in pixels
_MAX_SIDE = 256  # larger images are reduced to this side
_GAP = 10
_FONT = 12
_LINE = 16  # pixels from one line of text to the next
_WHITE, _BLACK = (255, 255, 255), (20, 20, 20)
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
)  # for names with characters beyond Latin


def draw_first_batch(session: Session, path: str | Path) -> str:
    """Draw the first training batch of a session to an image file. Returns a line that describes it."""
    path = user_path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"--show-batch {path}: the file name must end in .png, .jpg or .webp")
    loader, setup = session.loader, session.setup
    batches = loader.epoch(0)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator: drops the batches read ahead
    loader.close()
    view = session.trainer.view(batch, 0)
    height, width = setup.preprocess.size
    head = f"first batch of {setup.dataset.name}, {height}x{width} pixels, seed {session.config.seed}"
    picture, shown = draw(
        view, setup.preprocess, setup.dataset.class_names, [head, describe_augmentation(session.config)]
    )
    _save(picture, path)
    return f"wrote {shown} of the {len(view)} images of the first batch to {path}; no training was done"


def describe_augmentation(config: TrainConfig) -> str:
    """The augmentation as on the command line: "crop_scale=0.08,1 flip=0.5 mixup=0.8"."""
    values = {name: getattr(config.augment, name) for name in config.augment.active}
    return " ".join(f"{name}={format_value(value)}" for name, value in values.items()) or "no augmentation"


def _save(picture: Image.Image, path: Path) -> None:
    stream = io.BytesIO()
    picture.save(stream, Image.registered_extensions()[path.suffix.lower()], quality=92)
    atomic_write_bytes(path, stream.getvalue())


def pixels(images: Tensor, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Normalised float B C H W back to uint8 B H W C, clipped to 0..255."""
    values = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    mean, std = (np.asarray(part, dtype=np.float32) for part in (preprocess.mean, preprocess.std))
    levels: npt.NDArray[np.float32] = 255 * (values * std + mean)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def label_text(target: Tensor, class_names: Sequence[str]) -> list[str]:
    """The label, or "0.70 cat" and "0.30 dog" for mixed labels. target: a class index, or K probabilities."""
    if not target.ndim:
        return [printable(class_names[int(target)])]
    shares = target.detach().float().cpu().numpy()
    order = [int(k) for k in np.argsort(-shares, kind="stable")[:3] if shares[k] > 0.005]
    if len(order) == 1:
        return [printable(class_names[order[0]])]
    return [f"{shares[k]:.2f} {printable(class_names[k])}" for k in order]


def zoom_factor(height: int, width: int) -> float:
    """The factor by which an image is resized: an integer for small images, at most 1 for large ones."""
    longest = max(height, width)
    return max(1, _CELL // longest) if longest <= _MAX_SIDE else _MAX_SIDE / longest


def draw(
    view: View, preprocess: Preprocess, class_names: Sequence[str], heads: Sequence[str] = ()
) -> tuple[Image.Image, int]:
    """A grid of the first images with their labels below them, and the number of images drawn."""
    height, width = preprocess.size
    scale = zoom_factor(height, width)
    wide, high = round(width * scale), round(height * scale)
    shown = min(len(view), _MAX_IMAGES if max(wide, high) <= _CELL else _MAX_LARGE_IMAGES)
    images = pixels(view.images[:shown], preprocess)
    labels = [label_text(target, class_names) for target in view.targets[:shown]]
    font = _font("".join([*class_names, *heads]))
    cell_height = high + _LINE * max(len(label) for label in labels) + 2
    columns = min(_COLUMNS, shown)
    rows = -(-shown // columns)
    sheet_width = _GAP + columns * (wide + _GAP)
    characters = int((sheet_width - 2 * _GAP) / font.getlength("0"))
    lines = [line for head in heads for line in textwrap.wrap(head, characters)]
    top = _GAP + _LINE * len(lines) + (_GAP if lines else 0)
    sheet = Image.new("RGB", (sheet_width, top + rows * (cell_height + _GAP)), _WHITE)
    ImageDraw.Draw(sheet).multiline_text((_GAP, _GAP), "\n".join(lines), _BLACK, font)
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        cell = Image.new("RGB", (wide, cell_height), _WHITE)  # cuts off long names
        cell.paste(picture.resize((wide, high), resample))
        ImageDraw.Draw(cell).multiline_text((0, high + 3), "\n".join(label), _BLACK, font)
        sheet.paste(cell, (_GAP + number % columns * (wide + _GAP), top + number // columns * (cell_height + _GAP)))
    return sheet, shown


def _font(text: str) -> Any:
    """Pillow's default font, or a system font for characters that it may lack."""
    if any(ord(letter) > 0x17F for letter in text):
        for name in _FONTS:
            try:
                return ImageFont.truetype(name, _FONT)
            except OSError:
                continue
    return ImageFont.load_default(_FONT)
