"""What the model sees: the first training batch after crop, augmentation and mixing, drawn with its labels.

Shapes: B images, C channels, H W height and width, K classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vitrail.errors import VitrailError
from vitrail.images.preprocess import Preprocess
from vitrail.training.config.schema import TrainConfig
from vitrail.training.engine.batch_augmenter import View
from vitrail.utils.files import atomic_write_bytes
from vitrail.utils.text import printable

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    from vitrail.training.session import Session

_COLUMNS = 8
_MOST = 64  # images that are drawn, if they are small
_MOST_LARGE = 32  # and if they are not
_CELL = 112  # pixels a side that a small image is enlarged to, or to the whole multiple of its size below that
_LARGEST = 256  # pixels a side above which an image is reduced
_GAP = 10
_FONT = 12
_LINE = 16  # pixels from one line of text to the next
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")  # for names beyond Latin letters


def draw_first_batch(session: "Session", path: str | Path) -> str:
    """Draw the first batch that this session would learn from. Returns a line that says what is in the picture."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise VitrailError(f"{path} is no name for a picture: end it in .png")
    loader, setup = session.loader, session.setup
    batches = loader.epoch(0)
    batch = next(batches)
    batches.close()  # type: ignore[attr-defined]  # a generator: lets go of the images made ahead
    loader.close()
    view = session.trainer.view(batch, 0)
    height, width = setup.preprocess.size
    head = f"first batch of {setup.dataset.name}, {height}x{width} pixels, seed {session.config.seed}"
    picture, shown = draw(view, setup.preprocess, setup.dataset.class_names, [head, done_to(session.config)])
    _save(picture, path)
    return f"{shown} of the first batch's {len(view)} images are in {path}; nothing was trained"


def done_to(config: TrainConfig) -> str:
    """The augmentation, with its strengths: "crop_scale 0.08 to 1, flip 0.5, mixup 0.8"."""
    values = {name: getattr(config.augment, name) for name in config.augment.active}
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items()) or "no augmentation"


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " to ".join(_value(part) for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _save(picture: "Image.Image", path: Path) -> None:
    import io

    stream = io.BytesIO()
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    picture.save(stream, kind, **({} if kind == "PNG" else {"quality": 92}))
    atomic_write_bytes(path, stream.getvalue())


def pixels(images: Tensor, preprocess: Preprocess) -> npt.NDArray[np.uint8]:
    """Normalised float B C H W back to uint8 B H W C; what erasing or mixing brought outside 0..255 is clipped."""
    values = images.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    mean, std = (np.asarray(part, dtype=np.float32) for part in (preprocess.mean, preprocess.std))
    levels: npt.NDArray[np.float32] = 255 * (values * std + mean)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def words(target: Tensor, class_names: Sequence[str]) -> list[str]:
    """The label, or "cat 0.7" and "dog 0.3" where two are mixed. target: a class number, or K shares."""
    if not target.ndim:
        return [printable(class_names[int(target)])]
    shares = target.detach().float().cpu().numpy()
    order = [int(k) for k in np.argsort(-shares, kind="stable")[:3] if shares[k] > 0.005]
    if len(order) == 1:
        return [printable(class_names[order[0]])]
    return [f"{printable(class_names[k])} {shares[k]:.2f}" for k in order]


def scale_of(height: int, width: int) -> float:
    """What sides are multiplied by: a whole number for small images, 1, or less for large ones."""
    longest = max(height, width)
    return max(1, _CELL // longest) if longest <= _LARGEST else _LARGEST / longest


def draw(
    view: View, preprocess: Preprocess, class_names: Sequence[str], heads: Sequence[str] = ()
) -> "tuple[Image.Image, int]":
    """A grid of the view's first images with their labels below them, and how many there are of them."""
    from PIL import Image, ImageDraw

    height, width = preprocess.size
    scale = scale_of(height, width)
    wide, high = round(width * scale), round(height * scale)
    shown = min(len(view), _MOST if max(wide, high) <= _CELL else _MOST_LARGE)
    images = pixels(view.images[:shown], preprocess)
    labels = [words(target, class_names) for target in view.targets[:shown]]
    font = _font("".join([*class_names, *heads]))
    lines = [_fit(label, font, wide) for label in labels]
    below = _LINE * max(len(part) for part in lines) + 2
    columns = min(_COLUMNS, shown)
    rows = -(-shown // columns)
    heads = [part for text in heads for part in _wrap(text, font, columns * (wide + _GAP) - _GAP)]
    top = _GAP + _LINE * len(heads) + (_GAP if heads else 0)
    size = (_GAP + columns * (wide + _GAP), top + rows * (high + below + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(heads):
        pen.text((_GAP, _GAP + number * _LINE), text, _INK if number == 0 else _FAINT, font)
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    for number, (image, part) in enumerate(zip(images, lines, strict=True)):
        x = _GAP + number % columns * (wide + _GAP)
        y = top + number // columns * (high + below + _GAP)
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        sheet.paste(picture.resize((wide, high), resample), (x, y))
        for row, text in enumerate(part):
            pen.text((x, y + high + 3 + row * _LINE), text, _INK, font)
    return sheet, shown


def _font(text: str) -> Any:
    """Pillow's own font; for letters that it may not have, one of the system's."""
    from PIL import ImageFont

    if any(ord(letter) > 0x17F for letter in text):
        for name in _FONTS:
            try:
                return ImageFont.truetype(name, _FONT)
            except OSError:
                continue
    return ImageFont.load_default(_FONT)


def _fit(label: Sequence[str], font: "ImageFont.FreeTypeFont", width: int) -> list[str]:
    """The parts of a label in one line if there is room, else in a line each, cut to the width."""
    line = " / ".join(label)
    return [line] if font.getlength(line) <= width else [_cut(part, font, width) for part in label]


def _cut(text: str, font: "ImageFont.FreeTypeFont", width: int) -> str:
    """The text, or as much of it as fits; a share at its end stays."""
    if font.getlength(text) <= width:
        return text
    name, space, share = text.rpartition(" ")
    name, end = (name, space + share) if share.replace(".", "").isdigit() and name else (text, "")
    while name and font.getlength(name + "..." + end) > width:
        name = name[:-1]
    return name.rstrip() + "..." + end


def _wrap(text: str, font: "ImageFont.FreeTypeFont", width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
