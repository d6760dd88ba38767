"""--show-batch: an image of the first training batch after cropping, augmentation and mixing, with its labels.

Shapes: B images, C channels, H W height and width, K classes.
"""

import io
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
from vitrail.utils.files import atomic_write_bytes
from vitrail.utils.text import printable

_COLUMNS = 8
_MAX_IMAGES = 64
_MAX_LARGE_IMAGES = 32  # images above _CELL pixels
_CELL = 112  # small images are enlarged by an integer factor, up to this side in pixels
_MAX_SIDE = 256  # larger images are reduced to this side
_GAP = 10
_FONT = 12
_LINE = 16  # pixels from one line of text to the next
_WHITE, _BLACK, _GREY = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
)  # for names with characters beyond Latin


def draw_first_batch(session: Session, path: str | Path) -> str:
    """Draw the first training batch of a session to an image file. Returns a line that describes it."""
    path = Path(path).expanduser()
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
    """The augmentation, with its strengths: "crop_scale 0.08 to 1, flip 0.5, mixup 0.8"."""
    values = {name: getattr(config.augment, name) for name in config.augment.active}
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items()) or "no augmentation"


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " to ".join(_value(part) for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
    """The label, or "cat 0.70" and "dog 0.30" for mixed labels. target: a class index, or K probabilities."""
    if not target.ndim:
        return [printable(class_names[int(target)])]
    shares = target.detach().float().cpu().numpy()
    order = [int(k) for k in np.argsort(-shares, kind="stable")[:3] if shares[k] > 0.005]
    if len(order) == 1:
        return [printable(class_names[order[0]])]
    return [f"{printable(class_names[k])} {shares[k]:.2f}" for k in order]


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
    lines = [_fit(label, font, wide) for label in labels]
    below = _LINE * max(len(part) for part in lines) + 2
    columns = min(_COLUMNS, shown)
    rows = -(-shown // columns)
    heads = [part for text in heads for part in _wrap(text, font, columns * (wide + _GAP) - _GAP)]
    top = _GAP + _LINE * len(heads) + (_GAP if heads else 0)
    size = (_GAP + columns * (wide + _GAP), top + rows * (high + below + _GAP))
    sheet = Image.new("RGB", size, _WHITE)
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(heads):
        pen.text((_GAP, _GAP + number * _LINE), text, _BLACK if number == 0 else _GREY, font)
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for number, (image, part) in enumerate(zip(images, lines, strict=True)):
        x = _GAP + number % columns * (wide + _GAP)
        y = top + number // columns * (high + below + _GAP)
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        sheet.paste(picture.resize((wide, high), resample), (x, y))
        for row, text in enumerate(part):
            pen.text((x, y + high + 3 + row * _LINE), text, _BLACK, font)
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


def _fit(label: Sequence[str], font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The parts of a label in one line if they fit, else one line each, truncated to the width."""
    line = " / ".join(label)
    return [line] if font.getlength(line) <= width else [_truncate(part, font, width) for part in label]


def _truncate(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text truncated to the width; a number at its end is kept."""
    if font.getlength(text) <= width:
        return text
    name, space, share = text.rpartition(" ")
    name, end = (name, space + share) if share.replace(".", "").isdigit() and name else (text, "")
    while name and font.getlength(name + "..." + end) > width:
        name = name[:-1]
    return name.rstrip() + "..." + end


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
