"""`create_model`: a model of the catalog by name, randomly initialised or pretrained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

from vitrail.errors import ModelError
from vitrail.models.base import ImageModel
from vitrail.models.build import build_model, configure
from vitrail.models.catalog import variant
from vitrail.models.features import FeatureMaps
from vitrail.pretrained.load import load_pretrained


@overload
def create_model(name: str, *, features_only: Literal[False] = False, **options: Any) -> ImageModel: ...


@overload
def create_model(name: str, *, features_only: Literal[True], **options: Any) -> FeatureMaps: ...


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    **options: Any,
) -> ImageModel | FeatureMaps:
    """Create the catalog's model `name`.

    Args:
        name: a name from `list_models`.
        pretrained: load the model's default published weights.
        weights: load these instead: a tag of the published ones, hf:org/repo, timm:name, torchvision:name, a URL with
            #sha256=..., a file or a folder.
        num_classes: classes of the head; 0 for no head, so that the model returns features. Default: the pretrained
            head's, or the variant's.
        img_size: height and width in pixels, or one number for both.
        in_chans: channels of the image.
        global_pool: how features are pooled: "avg", of a ViT also "token", or "" for not at all, with 0 classes.
        features_only: return a backbone, images to a list of feature maps B C h w (`models.features.FeatureMaps`).
        out_indices: its stages: an int n for the last n, or a list; None: the last three blocks of a ViT, else all.
        options: any other field of the architecture's config, such as `drop_path_rate=0.1`.

    Raises:
        ModelError: no such name or option, or a combination that cannot be built.
        WeightsError: no such weights, or weights that do not match the model.
    """
    if out_indices is not None and not features_only:
        raise ModelError("out_indices needs features_only=True")
    row = variant(name)
    changes = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans, **options}
    if global_pool and hasattr(row.config, "global_pool"):  # a ViT's pooling decides its layers
        changes["global_pool"], global_pool = global_pool, None
    if pretrained or weights is not None:
        model = load_pretrained("default" if weights is None else weights, name, **changes).model
    else:
        model = build_model(configure(row.config, **changes))
    if global_pool is not None:
        model.set_pool(global_pool, model.num_classes)
    return FeatureMaps(model, out_indices) if features_only else model
