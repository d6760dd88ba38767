"""What a model knows about positions: similarity of position embeddings (ViT), and relative position biases (Swin).

Shapes: h w height and width of the grid of patches, C width, A heads, Wh Ww height and width of a window.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from vitrail.errors import ModelError
from vitrail.explanation.colors import colorize
from vitrail.models.swin import SwinBlock, SwinTransformer
from vitrail.models.vit import VisionTransformer

Values = npt.NDArray[np.float32]

_WIDTH = 1000  # pixels of the maps in a picture, about
_CELL = (1, 24)  # smallest and largest side of a cell in pixels
_GAP, _MARGIN, _BAR = 3, 12, 14  # between maps, around the picture, width of the colour scale
_FONT = 13
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def position_similarity(model: nn.Module) -> Values:
    """Cosine similarity of the position embedding of every patch with that of every other: h w h w, -1 to 1.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", 2020 (https://arxiv.org/abs/2010.11929), figure 7. The grid
    is that for which the model was built. An embedding of zeros has similarity 0.

    Raises:
        ModelError: not a ViT of this package.
    """
    model = _unwrapped(model)
    if not isinstance(model, VisionTransformer):
        raise ModelError(f"{type(model).__name__} has no position embeddings: use a ViT, DeiT or DINOv2 of vitrail")
    rows = model.pos_embed.detach()[0, -model.grid[0] * model.grid[1] :].double().cpu().numpy()  # without the prefix
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    similarity: Values = (rows @ rows.T).clip(-1, 1).astype(np.float32).reshape(*model.grid, *model.grid)
    return similarity


def relative_bias_tables(model: nn.Module) -> list[Values]:
    """The relative position biases of each block, in order: A (2 Wh - 1) (2 Ww - 1).

    The entry at row Wh - 1 + dy, column Ww - 1 + dx is added to the score of a query for the key that lies dy rows
    above and dx columns to the left of it: Liu et al., "Swin Transformer", 2021 (https://arxiv.org/abs/2103.14030),
    equation 4.

    Raises:
        ModelError: not a Swin of this package.
    """
    model = _unwrapped(model)
    if not isinstance(model, SwinTransformer):
        raise ModelError(f"{type(model).__name__} has no relative position biases: use a Swin of vitrail")
    tables = []
    for attention in [block.attn for block in model.modules() if isinstance(block, SwinBlock)]:
        height, width = attention.window
        table = attention.relative_position_bias_table.detach().float().cpu().numpy()  # (2 Wh - 1)(2 Ww - 1) A
        tables.append(np.ascontiguousarray(table.T).reshape(-1, 2 * height - 1, 2 * width - 1))
    return tables


def position_pictures(model: nn.Module) -> dict[str, Image.Image]:
    """What the model knows about positions, as pictures.

    Returns:
        ViT: "similarity", one map for each patch, placed as the patches are, of its similarity with all patches, and
        "centre", that of the patch at row h // 2, column w // 2. Swin: "relative-bias", one row a block, one map a
        head, with the query at the centre and keys around it.

    Raises:
        ModelError: neither a ViT nor a Swin of this package.
    """
    model = _unwrapped(model)
    if isinstance(model, SwinTransformer):
        tables = [
            table[:, ::-1, ::-1] for table in relative_bias_tables(model)
        ]  # a key on the left: left of the centre
        names = [f"block {index}" for index in range(len(tables))]
        heads = [f"head {index}" for index in range(max(len(table) for table in tables))]
        return {"relative-bias": _sheet(tables, names, heads, max(float(np.abs(table).max()) for table in tables))}
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"{type(model).__name__} has neither position embeddings nor relative position biases: use a ViT, DeiT, "
            "DINOv2 or Swin of vitrail"
        )
    similarity = position_similarity(model)
    height, width = model.grid
    row, column = height // 2, width // 2
    return {
        "similarity": _sheet(similarity, [str(y) for y in range(height)], [str(x) for x in range(width)], 1),
        "centre": _sheet(similarity[row : row + 1, column : column + 1], [f"row {row}"], [f"column {column}"], 1),
    }


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that torch.compile wraps."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def _sheet(rows: Sequence[Values] | Values, row_names: list[str], column_names: list[str], limit: float) -> Image.Image:
    """Rows of maps with their names and a colour scale; each row holds maps of one size, K H W. limit: the value of
    the strongest colour, above 0 for one and below 0 for the other."""
    limit = limit or 1.0
    cell = max(_CELL[0], min(_CELL[1], _WIDTH // max(row.shape[0] * row.shape[2] for row in rows)))
    font = ImageFont.load_default(_FONT)
    left = _MARGIN + max(int(font.getlength(name)) for name in row_names) + _MARGIN // 2
    top = _MARGIN + _FONT + _MARGIN // 2
    pitch = max(row.shape[2] for row in rows) * cell + _GAP
    right, bottom = left + max(len(row) for row in rows) * pitch, top + sum(row.shape[1] * cell + _GAP for row in rows)
    scale = max(bottom - top - _GAP, 8 * _FONT)  # height of the colour scale
    size = (right + 2 * _MARGIN + _BAR + int(font.getlength(f" {-limit:.2g} ")), top + scale + _MARGIN)
    sheet = Image.new("RGB", size, _PAPER)
    draw, y = ImageDraw.Draw(sheet), top
    # Names of columns stand side by side where they fit, else every second, fifth, ... one.
    widest = max(font.getlength(name) for name in column_names) + 4
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * pitch >= widest or n == 100)
    for index, name in list(enumerate(column_names))[::every]:
        middle = left + index * pitch + (pitch - _GAP) // 2
        draw.text((middle, _MARGIN), name, fill=_INK, font=font, anchor="mt")
    for name, row in zip(row_names, rows, strict=True):
        for index, values in enumerate(row):
            shares = np.asarray(values, np.float32) / np.float32(limit)
            image = Image.fromarray(colorize(shares, signed=True))
            image = image.resize((image.width * cell, image.height * cell), Image.Resampling.NEAREST)
            sheet.paste(image, (left + index * pitch, y))
        draw.text((left - _MARGIN // 2, y + row.shape[1] * cell // 2), name, fill=_INK, font=font, anchor="rm")
        y += row.shape[1] * cell + _GAP
    bar = np.linspace(1, -1, scale, dtype=np.float32)[:, None].repeat(_BAR, axis=1)
    sheet.paste(Image.fromarray(colorize(bar, signed=True)), (right + _MARGIN, top))
    for value, at, anchor in ((limit, 0, "la"), (0.0, scale // 2, "lm"), (-limit, scale, "ld")):
        draw.text((right + _MARGIN + _BAR + 5, top + at), f"{value:.2g}", fill=_INK, font=font, anchor=anchor)
    return sheet
