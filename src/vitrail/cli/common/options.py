"""Arguments and options that several commands have, and MODEL's classifier."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from vitrail.prediction import BaseClassifier

AnyClassifier = TypeVar("AnyClassifier", bound="BaseClassifier")
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run or model folder, an export, a catalog name, hf:org/repo, or a checkpoint file.",
        show_default=False,
    ),
]
DATA: Any = typer.Argument(
    metavar="DATA",
    help="A folder of images, a CSV or parquet table, a dataset's name, wds: shards or hf-dataset:.",
    show_default=False,
)
DataArgument = Annotated[str, DATA]
PathsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Images, folders (searched recursively), tables of paths (CSV), or patterns such as '*.jpg'.",
    ),
]
SizeOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Input size of the model, pixels: 384, or height x width such as 320x192."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="cpu, cuda, cuda:1 or mps; by default the best available. Exports: cpu."),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        metavar="auto|bf16|off",
        help="bfloat16 (bf16), float32 (off), or the faster one on this hardware (auto). Exports: auto.",
    ),
]
TtaOption = Annotated[
    str | None,
    typer.Option(metavar="flip|crops", help="Average over mirror images (2x the time) or five crops (5x)."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A checkpoint file, folder or hf:org/repo; MODEL is then its catalog name."),
]
BatchSizeOption = Annotated[int | None, typer.Option(min=1, help="Images per batch; by default by image size.")]
SplitOption = Annotated[str | None, typer.Option(help="test, val or train; by default test if there is one, else val.")]
DataDirOption = Annotated[str | None, typer.Option(metavar="FOLDER", help="Folder of a named dataset's files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def open_model(
    source: str, device: str | None, img_size: str | None, precision: str, weights: str | None = None
) -> "BaseClassifier":
    """Load MODEL; see `print_loaded`. weights: of the architecture that MODEL then names."""
    from vitrail.cli.common.progress import starting

    model = None if weights is None else source
    with starting("loading the model"):
        from vitrail.classifier import load

        loaded = load(source if weights is None else weights, device or "auto", img_size, precision, model)
    return print_loaded(loaded)


def print_loaded(classifier: "AnyClassifier") -> "AnyClassifier":
    """Print to stderr how a model's weights were loaded, unless it is a model folder of vitrail; returns the model."""
    if classifier.report is not None and not isinstance(classifier.report, dict):  # else a run's summary
        from vitrail.cli.common.tables import stderr

        stderr().print(str(classifier.report))
    return classifier


def print_tta(kind: str | None) -> None:
    """Print to stderr what test-time augmentation costs, if there is one."""
    if kind is not None:
        from vitrail.cli.common.tables import stderr
        from vitrail.inference.tta import describe_cost

        stderr().print(describe_cost(kind))


def refuse_options(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raise ConfigError if one of these options was given: it would have no effect, for this reason."""
    for name in names:
        if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
            raise ConfigError(f"{reason}: leave out --{name.replace('_', '-')}")
