"""`fold_model`, and the table of folds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

from torch import nn

from vitrail.deploy.fold import folds
from vitrail.deploy.fold.forms import Deployed, to_form
from vitrail.errors import ConfigError, did_you_mean
from vitrail.images.preprocess import Preprocess
from vitrail.models.base import ImageModel

# In the order in which they are applied.
FOLDS: dict[str, Callable[[Deployed], Deployed]] = {
    "norms": folds.fold_norms,
    "query_scale": folds.fold_query_scale,
    "key_bias": folds.fold_key_bias,
    "value_bias": folds.fold_value_bias,
    "layer_scale": folds.fold_layer_scale,
    "batch_norms": folds.fold_batch_norms,
    "normalize": folds.fold_normalize,
    "positions": folds.fold_positions,
    "heads": folds.fold_heads,
    "window_bias": folds.fold_window_bias,
    "window_order": folds.fold_window_order,
    "last_block": folds.fold_last_block,
}


def fold_model(model: ImageModel, preprocess: Preprocess, skip: Collection[str] = ()) -> nn.Module:
    """`model` for images of `preprocess.size`, on the CPU in evaluation mode: pixels B I H W, floats in 0..255, to
    logits B K and features B F. `model` itself is not changed.

    skip: names of FOLDS to leave out.

    Raises:
        ConfigError: no fold of this name.
        ModelError: not an architecture of vitrail, or it cannot take images of this size.
    """
    for name in skip:
        if name not in FOLDS:
            raise ConfigError(f"no fold {name!r}{did_you_mean(name, FOLDS)}: the folds are {', '.join(FOLDS)}")
    folded = to_form(copy.deepcopy(model).cpu().eval(), preprocess)
    for name, fold in FOLDS.items():
        if name not in skip:
            folded = fold(folded)
    return folded.eval().requires_grad_(False)
