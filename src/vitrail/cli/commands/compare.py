"""`vitrail compare`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.common.options import DataArgument, DataDirOption, DeviceOption, JsonOption, SizeOption, refuse_options
from vitrail.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


_Settings = Annotated[
    list[str] | None, typer.Argument(metavar="key=value...", help="Settings of all trainings, as of `vitrail train`.")
]
_Models = Annotated[
    str | None,
    typer.Option(
        metavar="A,B",
        help="From `vitrail models`, or NAME@RECIPE; default: a ViT, a Swin if it fits, a ResNet of similar cost.",
    ),
]
_Budget = Annotated[str | None, typer.Option(help="Time of each training: 90s, 10m, 2h.  [default: 10m]")]
_Epochs = Annotated[float | None, typer.Option(help="Passes over the training images, instead of a budget.")]
_Shares = Annotated[str, typer.Option(metavar="P,P", help="Percentages of the training images.")]
_Pretrained = Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")]
_Out = Annotated[
    str | None,
    typer.Option(help="The folder; by default runs/compare-DATA, with --curve none. Run again to continue it."),
]
_Curve = Annotated[
    bool, typer.Option("--curve", help="Train nothing; what twice the images would give, from frozen features.")
]
_Features = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Of --curve: a model, or pixels.  [default: deit_small_patch16_224]")
]
_Verbose = Annotated[bool, typer.Option("--verbose", help="Print the progress of each training.")]


def compare(
    context: typer.Context,
    data: DataArgument,
    settings: _Settings = None,
    models: _Models = None,
    budget: _Budget = None,
    epochs: _Epochs = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model on each share.")] = 3,
    shares: _Shares = "25,50,100",
    pretrained: _Pretrained = False,
    img_size: SizeOption = None,
    out: _Out = None,
    curve: _Curve = False,
    features: _Features = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    verbose: _Verbose = False,
    json: JsonOption = False,
) -> int:
    """Compare models on images: each trained for the same time with its own recipe, and tested on the same images.

    Says which is more accurate, or that these test images cannot tell. A comparison that was interrupted is continued
    by the same command.

    Example: `vitrail compare photos/ --budget 10m --seeds 3`
    """
    from vitrail.cli.common.tables import print_json, stderr
    from vitrail.training.config.schema import parse_overrides
    from vitrail.training.engine.interrupt import Stopped

    named: dict[str, Any] = {"epochs": epochs, "img_size": img_size, "data_dir": data_dir, "device": device}
    given = {key: value for key, value in named.items() if value is not None}
    given |= ({"pretrained": True} if pretrained else {}) | parse_overrides(settings or [])
    if curve:
        result = _curve(context, data, features, out, given)
        print_json(result) if json else _print_curve(result)
        return 0
    if features is not None:
        raise ConfigError("--features belongs to --curve: add it, or leave out --features")
    from vitrail.comparison.run import compare as run

    try:
        result = run(
            data,
            [name.strip() for name in models.split(",")] if models else None,
            budget=budget,
            seeds=seeds,
            shares=_percentages(shares),
            out=out,
            verbose=verbose,
            log=lambda text: stderr().print(text),
            command=context.obj,
            **given,
        )
    except Stopped as stopped:
        stderr().print("stopped; the same command continues")
        return 128 + stopped.signal
    print_json(result) if json else _print(result)
    return 0


def _percentages(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--shares takes percentages with commas, such as 25,50,100, not {text!r}") from None


def _curve(
    context: typer.Context, data: str, features: str | None, out: str | None, given: dict[str, Any]
) -> dict[str, Any]:
    refuse_options(context, ("models", "budget", "seeds", "shares"), "--curve trains nothing")
    from vitrail.comparison.curve import FEATURES, learning_curve

    return learning_curve(data, features or FEATURES, out=out, command=context.obj, **given)


def _print_curve(result: "Mapping[str, Any]") -> None:
    from vitrail.cli.common.tables import stdout, table
    from vitrail.comparison.verdict import format_spread

    console, ahead = stdout(), result["forecast"]
    rows = [[f"{row['images']:,}", format_spread(row["top1"])] for row in result["curve"]]
    console.print(table([("training images", ">"), ("top-1, %", ">")], rows))
    console.print(
        f"\nwith {ahead['images']:,} training images: {ahead['top1']:.1f} % "
        f"(80 % interval {ahead['low']:.1f} to {ahead['high']:.1f} %)"
    )


def _print(result: "Mapping[str, Any]") -> None:
    from vitrail.cli.common.tables import stdout, table
    from vitrail.comparison.verdict import format_spread
    from vitrail.utils.text import format_duration

    console = stdout()
    headers = [("model", "<"), ("top-1, %", ">"), ("trained", ">"), ("latency", ">"), ("parameters", ">"),
               ("corrupted, %", ">"), ("ECE, %", ">")]  # fmt: skip
    rows = [
        [
            model["name"],
            format_spread(model["top1"]),
            format_duration(model["seconds"]),
            f"{model['latency_ms']:.2f} ms",
            f"{model['params']:,}",
            format_spread(model["corrupted"]),
            f"{100 * model['ece']['mean']:.2f}",
        ]
        for model in result["models"]
    ]
    console.print(table(headers, rows))
    console.print(f"\n{result['paragraph']}\n")
    console.print(f"report  {result['folder']}/compare.html")
