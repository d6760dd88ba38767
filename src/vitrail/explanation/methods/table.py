"""The table of methods: what `method=` names, and which model has which."""

from torch import nn

from vitrail.errors import ModelError, did_you_mean
from vitrail.explanation.methods.attention import attention, legrad, relevance, rollout, tokens
from vitrail.explanation.methods.gradcam import gradcam
from vitrail.explanation.methods.method import EXTERNAL, FAMILIES, MERGED, Method, family_of
from vitrail.explanation.methods.perturbation import integrated_gradients, occlusion
from vitrail.utils.text import printable

UNMERGED = (*FAMILIES, EXTERNAL)
ANY = (*UNMERGED, MERGED)

ATTENTION = ("vit", "swin")
CHEFER = "Chefer et al., 2021, https://arxiv.org/abs/2103.15679"
SELVARAJU = "Selvaraju et al., 2017, https://arxiv.org/abs/1610.02391"
BOUSSELHAM = "Bousselham et al., 2024, https://arxiv.org/abs/2404.03214"
SUNDARARAJAN = "Sundararajan et al., 2017, https://arxiv.org/abs/1703.01365"
ZEILER = "Zeiler and Fergus, 2013, https://arxiv.org/abs/1311.2901"
ABNAR = "Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928"
DOSOVITSKIY = "Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929"
DARCET = "Darcet et al., 2023, https://arxiv.org/abs/2309.16588"

_ROWS = (  # name, function, families, class-specific, signed, reference
    Method("relevance", relevance, ATTENTION, True, False, CHEFER, negated_if_ruled_out=True),
    Method("gradcam", gradcam, UNMERGED, True, False, SELVARAJU),
    Method("legrad", legrad, ("vit",), True, False, BOUSSELHAM),
    Method("integrated_gradients", integrated_gradients, UNMERGED, True, True, SUNDARARAJAN),
    Method("occlusion", occlusion, ANY, True, True, ZEILER),
    Method("rollout", rollout, ("vit",), False, False, ABNAR),
    Method("attention", attention, ATTENTION, False, False, DOSOVITSKIY, selects_block=True, selects_head=True),
    Method("tokens", tokens, ATTENTION, False, False, DARCET, selects_block=True),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}

DEFAULTS = {
    "vit": "relevance",
    "swin": "relevance",
    "cnn": "gradcam",
    EXTERNAL: "gradcam",
    MERGED: "occlusion",
}  # by family


def default_method(model: nn.Module) -> str:
    """The method for a model when none is named."""
    return DEFAULTS[family_of(model)]


def methods_of(model: nn.Module) -> list[str]:
    """The methods that the model's family has, in the order of the table."""
    family = family_of(model)
    return [name for name, method in METHODS.items() if family in method.families]


def choose_method(name: str | None, model: nn.Module) -> Method:
    """The method of this name, or the model's default for None. Nothing is substituted.

    Raises:
        ModelError: there is no such method, or the model's family does not have it.
    """
    name = name or default_method(model)
    if name not in METHODS:
        raise ModelError(f"no method {printable(name)!r}{did_you_mean(name, METHODS)}: use {', '.join(METHODS)}")
    if name not in (known := methods_of(model)):
        raise ModelError(
            f"{name} does not apply to {type(model).__name__} ({family_of(model)}): use {', '.join(known)}"
        )
    return METHODS[name]
