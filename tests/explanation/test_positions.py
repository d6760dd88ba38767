"""Position similarity against scikit-learn, bias tables against timm, and the pictures against what was planted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from models.test_intermediates import SWINS, VITS
from models.test_parity import pair, randomize
from vitrail.errors import ModelError
from vitrail.explanation.positions import position_pictures, position_similarity, relative_bias_tables
from vitrail.models.build import build_model
from vitrail.models.configs import ResNetConfig, ViTConfig


@pytest.mark.parametrize("config", VITS.values(), ids=VITS)
def test_similarity_is_the_cosine(config: ViTConfig) -> None:
    model = build_model(replace(config, img_size=(40, 24)))
    randomize(model)
    skipped = 0 if config.no_embed_class else config.num_prefix_tokens
    expected = cosine_similarity(model.pos_embed[0, skipped:].detach().numpy()).reshape(5, 3, 5, 3)
    found = position_similarity(model)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(position_similarity(model.bfloat16()), expected, rtol=0, atol=0.02)


def test_embeddings_of_zeros_have_no_similarity() -> None:
    model = build_model(VITS["vit"])
    torch.nn.init.zeros_(model.get_parameter("pos_embed"))
    assert (position_similarity(model) == 0).all()


@pytest.mark.parametrize("size", [(32, 32), (8, 16)], ids=str)
def test_tables_give_the_biases_of_timm(size: tuple[int, int]) -> None:
    """In timm's bias A n n, of a query and a key, the table's entry at their offset; also in a smaller window."""
    ours, theirs = pair(replace(SWINS["swin"], img_size=size))
    expected = [block.attn for stage in theirs.layers for block in stage.blocks]  # type: ignore[union-attr]
    tables = relative_bias_tables(ours)
    assert len(tables) == len(expected)
    for table, attention in zip(tables, expected, strict=True):
        height, width = attention.window_size
        assert table.shape == (attention.num_heads, 2 * height - 1, 2 * width - 1)
        y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
        found = table[:, y[:, None] - y + height - 1, x[:, None] - x + width - 1]
        np.testing.assert_array_equal(found, attention._get_rel_pos_bias()[0].detach().numpy())


def orange(picture: Image.Image) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the pixels with the strongest colour of positive values, without the colour scale."""
    pixels = np.asarray(picture)[:, : picture.width - 50].astype(int)
    return np.nonzero((np.abs(pixels - (140, 55, 0)) <= 2).all(axis=2))


def test_picture_of_similarity() -> None:
    """Orthogonal embeddings: each map has one cell at 1, its own, which moves to the right and down over the sheet."""
    model = build_model(replace(VITS["vit"], img_size=(24, 40), embed_dim=48))
    model.pos_embed.data[0, 1:] = torch.eye(48)[:15]
    pictures = position_pictures(model)
    assert pictures.keys() == {"similarity", "centre"}
    rows, columns = orange(pictures["similarity"])
    assert len(set(rows)) == 3 * 24  # cells of 24 pixels
    assert len(set(columns)) == 5 * 24
    starts = [value for value in sorted(set(columns)) if value - 1 not in set(columns)]
    assert set(np.diff(starts)) == {5 * 24 + 3 + 24}  # a map, a gap and a cell further
    rows, columns = orange(pictures["centre"])
    assert len(rows) == 24 * 24


def test_picture_of_biases_has_the_query_at_the_centre() -> None:
    """A bias for the key one column to the left of the query."""
    model = build_model(SWINS["swin"])
    for attention in (block.attn for stage in model.layers for block in stage.blocks):  # type: ignore[union-attr]
        table = attention.relative_position_bias_table.data
        height, width = attention.window
        y, x = (axis.ravel() for axis in np.mgrid[:height, :width])
        left = attention.relative_position_index[(y[:, None] == y) & (x[:, None] - x == 1)].unique()
        table.zero_()[left, 0] = 2.0
    pictures = position_pictures(model)
    assert pictures.keys() == {"relative-bias"}
    rows, columns = orange(pictures["relative-bias"])
    cell = len(set(columns))
    assert len(set(rows)) == 7 * cell  # one cell in each block's first map of 7x7
    background = np.asarray(pictures["relative-bias"])[rows.min()]
    first_map = np.flatnonzero((background != 255).any(axis=1))
    start = first_map[first_map >= columns.min() - 3 * cell].min()
    assert columns.min() - start == 2 * cell  # of columns 0 to 6, the one before the centre


@pytest.mark.parametrize("look", [position_similarity, relative_bias_tables, position_pictures])
def test_a_model_without_positions(look: object) -> None:
    assert callable(look)
    with pytest.raises(ModelError, match=r"ResNet .* vitrail"):
        look(build_model(ResNetConfig(layers=(1, 1, 1, 1), num_classes=5)))


def test_each_family_has_its_own() -> None:
    with pytest.raises(ModelError, match="SwinTransformer has no position embeddings"):
        position_similarity(build_model(SWINS["swin"]))
    with pytest.raises(ModelError, match="VisionTransformer has no relative position biases"):
        relative_bias_tables(build_model(VITS["vit"]))
