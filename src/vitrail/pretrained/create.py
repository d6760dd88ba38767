"""`create_model`: a model of the catalog by name, with fresh or with pretrained weights."""

from pathlib import Path
from typing import Any

from vitrail.models.base import ImageModel
from vitrail.models.build import build_model, configure
from vitrail.models.catalog import variant
from vitrail.pretrained.load import load_pretrained


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    **options: Any,
) -> ImageModel:
    """Create the catalog's model `name`.

    Args:
        name: as `list_models` gives it.
        pretrained: load the default of its published weights.
        weights: load these instead: a tag of the published ones, hf:org/repo, timm:name, torchvision:name, an URL with
            #sha256=..., a file or a folder.
        num_classes: classes of the head; 0 leaves the head out, so that the model gives features. Pretrained weights
            keep their own head where this is not given.
        img_size: height and width in pixels, or one number for both.
        in_chans: channels of the image.
        options: any other field of the architecture's config, such as `drop_path_rate=0.1`.

    Raises:
        VitrailError: no such name, option, combination or weights; or weights that do not fit.
    """
    row = variant(name)
    changes = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans, **options}
    if not pretrained and weights is None:
        return build_model(configure(row.config, **changes))
    return load_pretrained("default" if weights is None else weights, name, **changes).model
