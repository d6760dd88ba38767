"""`create_model`: a model of the catalog by name, randomly initialised or pretrained."""

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
        name: a name from `list_models`.
        pretrained: load the model's default published weights.
        weights: load these instead: a tag of the published ones, hf:org/repo, timm:name, torchvision:name, a URL with
            #sha256=..., a file or a folder.
        num_classes: classes of the head; 0 for no head, so that the model returns features. Default: the pretrained
            head's, or the variant's.
        img_size: height and width in pixels, or one number for both.
        in_chans: channels of the image.
        options: any other field of the architecture's config, such as `drop_path_rate=0.1`.

    Raises:
        ModelError: no such name or option, or a combination that cannot be built.
        WeightsError: no such weights, or weights that do not match the model.
    """
    row = variant(name)
    changes = {"num_classes": num_classes, "img_size": img_size, "in_chans": in_chans, **options}
    if not pretrained and weights is None:
        return build_model(configure(row.config, **changes))
    return load_pretrained("default" if weights is None else weights, name, **changes).model
