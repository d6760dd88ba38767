"""`vitrail models`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.common.options import JsonOption

if TYPE_CHECKING:
    from vitrail.models.catalog import Variant


def models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern such as 'swin*'.")] = "*",
    json: JsonOption = False,
) -> None:
    """List the available models: size, cost, input, published accuracy and licence.

    Example: `vitrail models 'swin*'`
    """
    from vitrail.cli.common.tables import print_json, stdout, table
    from vitrail.errors import ModelError, did_you_mean
    from vitrail.models.catalog import VARIANTS, list_models

    variants = [VARIANTS[name] for name in list_models(pattern)]
    if not variants:
        raise ModelError(
            f"no model matches {pattern!r}{did_you_mean(pattern, _prefixes(VARIANTS))}; `vitrail models` lists all"
        )
    if json:
        print_json([_to_dict(variant) for variant in variants])
        return

    headers = [("model", "<"), ("params", ">"), ("GMACs", ">"), ("input", ">"), ("top-1", ">"), ("licence", "<")]
    stdout().print(table(headers, [_row(variant) for variant in variants]))


def _prefixes(names: Iterable[str]) -> list[str]:
    """swin, swin_tiny, swin_tiny_patch4, ...: candidates for a mistyped part of a name."""
    parts = [name.split("_") for name in names]
    return list(dict.fromkeys("_".join(part[:count]) for part in parts for count in range(1, len(part) + 1)))


def _to_dict(variant: "Variant") -> dict[str, Any]:
    config = variant.config
    return {
        "name": variant.name,
        "family": variant.family,
        "params": variant.params,
        "gmacs": variant.gmacs,
        "input_size": [config.in_chans, *config.img_size],
        "weights": [
            {"tag": w.tag, "source": w.source, "licence": w.licence, "top1": w.top1, "classes": w.num_classes}
            for w in variant.weights
        ],
    }


def _row(variant: "Variant") -> list[str]:
    height, width = variant.config.img_size
    weights = variant.weights[0] if variant.weights else None  # the default weights
    return [
        variant.name,
        f"{variant.params / 1e6:.1f} M",
        f"{variant.gmacs:.2g}" if variant.gmacs < 1 else f"{variant.gmacs:.1f}",
        str(height) if height == width else f"{height}x{width}",
        f"{weights.top1:.1f} %" if weights and weights.top1 else "",
        (weights.licence or "not stated") if weights else "",
    ]
