"""From a map on a model's input to pictures of the original image: placing, overlay, caption.

Shapes: h w height and width of a map, H W of the model's input or of an image.
"""

import io
import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.explanation.colors import Values, colorize, strength

Box = tuple[float, float, float, float]  # top, left, bottom, right
Size = tuple[int, int]  # height, width

SIDE = 1024  # pixels: longer side of a picture at most
_ENLARGE_TO = 384  # smaller pictures are enlarged by a whole number, up to about this side
_UNSEEN = (128, 128, 128, 170)  # over what the model did not see
_FONT, _MARGIN, _MIN_CAPTION, _MIN_TILE = 15, 10, 320, 120  # pixels
_INK = (27, 27, 27)


def place(values: Values, input_size: Size, box: Box, size: Size) -> Values:
    """A map h w of a model's input, in an image's coordinates: float32 H W, 0 where the model did not see the image.

    input_size: of the model's input; a cell of the map is a square of ceil(H / h) of its pixels, and values between the
    centres of cells are interpolated bilinearly. box: what the input shows of the image (`Preprocess.crop_box`).
    size: of the image.
    """
    top, left, bottom, right = box
    rows = _place_rows(values, input_size[0], (top, bottom), size[0])
    return np.ascontiguousarray(_place_rows(rows.T, input_size[1], (left, right), size[1]).T)


def _place_rows(values: Values, input_length: int, span: tuple[float, float], length: int) -> Values:
    """`place` along the first axis."""
    start, end = span
    position = (np.arange(length) + 0.5 - start) / (end - start) * input_length
    cells = len(values)
    cell = np.clip(position / math.ceil(input_length / cells) - 0.5, 0, cells - 1)
    low = np.minimum(cell.astype(np.intp), max(cells - 2, 0))
    part = (cell - low).astype(np.float32)[:, None]
    placed: Values = values[low] * (1 - part) + values[np.minimum(low + 1, cells - 1)] * part
    placed[(position < 0) | (position > input_length)] = 0
    return placed


def heat_picture(values: Values, input_size: Size, box: Box, size: Size, signed: bool) -> Image.Image:
    """The map as an RGBA picture of `size` to lay over the image.

    Weak values are transparent. What the model did not see is grey.
    """
    shares = place(strength(values, signed), input_size, box, size)
    alpha = np.rint(255 * np.sqrt(np.clip(np.abs(shares) if signed else shares, 0, 1))).astype(np.uint8)
    seen = place(np.ones_like(values), input_size, box, size)[..., None] > 0
    pixels = np.concatenate([colorize(shares, signed), alpha[..., None]], axis=2)
    return Image.fromarray(np.where(seen, pixels, np.array(_UNSEEN, np.uint8)))


def reduced(image: Image.Image, side: int = SIDE) -> Image.Image:
    """A copy with a longer side of at most `side` pixels."""
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def enlarged(image: Image.Image) -> Image.Image:
    """A small image with every pixel as a square of several; another one as it is."""
    factor = max(1, _ENLARGE_TO // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def with_caption(image: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The image with lines of text below it, wrapped to its width."""
    font = ImageFont.load_default(_FONT)
    width = max(image.width, _MIN_CAPTION)
    letters = int((width - 2 * _MARGIN) / font.getlength("n"))
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, letters) or [""])
    box = ImageDraw.Draw(image).multiline_textbbox((0, 0), text, font=font, spacing=6)
    canvas = Image.new("RGB", (width, image.height + math.ceil(box[3]) + 2 * _MARGIN), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    ImageDraw.Draw(canvas).multiline_text((_MARGIN, image.height + _MARGIN), text, fill=_INK, font=font, spacing=6)
    return canvas


def grid(images: Sequence[Image.Image], labels: Sequence[str]) -> Image.Image:
    """Pictures of one size in rows, each reduced, with its label below."""
    columns = math.ceil(math.sqrt(len(images)))
    small = [reduced(image, max(_MIN_TILE, SIDE // columns)) for image in images]
    width, height = small[0].width + _MARGIN, small[0].height + _FONT + 2 * _MARGIN
    canvas = Image.new("RGB", (width * columns, height * math.ceil(len(images) / columns)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(_FONT)
    for number, (image, label) in enumerate(zip(small, labels, strict=True)):
        left, top = number % columns * width, number // columns * height
        canvas.paste(image, (left, top))
        draw.text((left, top + image.height + _MARGIN // 2), label, fill=_INK, font=font)
    return canvas


def encode_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
