"""`vitrail train`."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrail.cli.common.options import DATA, DataDirOption, DeviceOption, JsonOption, SizeOption
from vitrail.cli.common.progress import starting

if TYPE_CHECKING:
    from rich.table import Table


def _print_help(context: typer.Context, wanted: bool) -> None:
    """The usual help, and the settings that are not options."""
    if not wanted:
        return
    if text := context.get_help():  # typer may have printed it already
        print(text.rstrip())
    from rich.console import Console
    from rich.panel import Panel

    settings = _settings_table({parameter.name for parameter in context.command.params})
    Console().print(
        Panel(settings, title="Settings: key=value, such as lr=1e-3", title_align="left", border_style="dim")
    )
    raise typer.Exit


def _settings_table(options: set[str | None]) -> "Table":
    """Every key of the config that is not an option, under its section."""
    from rich.table import Table

    from vitrail.training.config.schema import SECTIONS

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("setting", style="cyan", no_wrap=True)
    table.add_column("default (a recipe\nmay set another)", style="dim", no_wrap=True)
    table.add_column("meaning", vertical="bottom")
    for name, section in SECTIONS.items():
        fields = {key: field for key, field in section.model_fields.items() if key not in options}
        if fields:
            table.add_row()
            table.add_row(f"[bold]{name}", "", f"[bold]{(section.__doc__ or '').splitlines()[0]}")
        for key, field in fields.items():
            table.add_row(f"  {key}", _format(field.default), field.description)
    return table


def _format(value: object) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, tuple):
        return ",".join(_format(part) for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


_NOT_PASSED_ON = {"data", "settings", "json", "help", "verify_resume"}  # parameters that the library does not have

_Settings = Annotated[
    list[str] | None, typer.Argument(metavar="key=value...", help="Any setting below, such as lr=1e-3.")
]
_Model = Annotated[
    str | None, typer.Option(metavar="NAME", help="A name from `vitrail models`; by default chosen for the images.")
]
_Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--no-pretrained",
        help="Start from the published weights; by default for photographs, if they can be had.",
    ),
]
_Weights = Annotated[str | None, typer.Option(help="Start from these weights: a file, a folder or hf:org/repo.")]
_Teacher = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Distil from this model too; settings: see distill below.")
]
_Probe = Annotated[bool, typer.Option("--probe", help="Linear probe: freeze the model, fit a linear head.")]
_Fit = Annotated[str | None, typer.Option(metavar="HOW", help="crop, pad or squash images of another aspect ratio.")]
_Balance = Annotated[
    str | None, typer.Option(metavar="HOW", help="Class balance: oversample (sample) or class weights (loss).")
]
_Recipe = Annotated[
    str | None, typer.Option(metavar="NAME", help="deit, swin, augreg, plain, small, finetune, ..., or a TOML file.")
]
_Verbose = Annotated[bool, typer.Option("--verbose", help="Print all parameter groups and every tensor loaded.")]
_ShowBatch = Annotated[
    str | None, typer.Option(metavar="PNG", help="Draw the first batch as the model gets it, without training.")
]
_LrFind = Annotated[
    str | None, typer.Option(metavar="SVG", help="Learning rate range test: plot and suggestion, without training.")
]
_VerifyResume = Annotated[
    bool, typer.Option("--verify-resume", help="Check that a killed run resumes bit for bit; takes a minute.")
]
_Help = Annotated[  # typer's own --help has no settings
    bool, typer.Option("--help", "-h", callback=_print_help, is_eager=True, help="Show this message and exit.")
]


def train(
    context: typer.Context,
    data: Annotated[str | None, DATA] = None,
    settings: _Settings = None,
    model: _Model = None,
    pretrained: _Pretrained = None,
    weights: _Weights = None,
    teacher: _Teacher = None,
    probe: _Probe = False,
    img_size: SizeOption = None,
    fit: _Fit = None,
    balance: _Balance = None,
    out: Annotated[str | None, typer.Option(help="The run folder; by default runs/DATA-MODEL.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training images.")] = None,
    budget: Annotated[str | None, typer.Option(help="Training time instead of epochs: 90s, 10m, 2h.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed, not of the split.  [default: 0]")] = None,
    recipe: _Recipe = None,
    resume: Annotated[
        str | None, typer.Option(help="Resume the run in this folder; a finished one with more --epochs.")
    ] = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = None,
    verbose: _Verbose = False,
    show_batch: _ShowBatch = None,
    lr_find: _LrFind = None,
    verify_resume: _VerifyResume = False,
    json: JsonOption = False,
    help: _Help = False,
) -> int:
    """Train or fine-tune a model on images, and write a run folder.

    Model and settings that are not given are chosen for the images. Ctrl-C saves the run; `--resume` continues it.

    Example: `vitrail train photos/ --pretrained --epochs 10 --out runs/photos`
    """
    data, given = _arguments(context, data, list(settings or []))
    if verify_resume:
        from vitrail.training.verify_resume import verify_resume as verify

        verdict = verify(data, **given)
        print(verdict)
        return 0 if verdict.same else 1
    try:
        with starting("loading PyTorch"):
            from vitrail.training.engine.interrupt import Stopped
            from vitrail.training.run import train as run
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped before the run began: nothing was written") from None
    try:
        classifier = run(data, **given)
    except Stopped as stopped:  # typer would exit with 130, the status of Ctrl-C, for every signal
        return 128 + stopped.signal
    if json and show_batch is None:
        from vitrail.cli.common.tables import print_json

        print_json(classifier.report)
    return 0


def explain_option(name: str, options: Iterable[str]) -> str:
    """What to write instead of an option that train does not have, such as --lr. options: those that it has."""
    from vitrail.errors import ConfigError, did_you_mean
    from vitrail.training.config.aliases import CLOSE, key_of
    from vitrail.training.config.schema import KEYS

    word = name.lstrip("-").replace("-", "_")
    try:
        key = key_of(word, KEYS)
    except ConfigError as error:
        hint = "" if "not supported" in str(error) else did_you_mean(name, options, CLOSE)
        return f"there is no option {name}{hint}; see `vitrail train --help`" if hint else str(error)
    option = f"--{key.replace('_', '-')}"
    return f"{name} is {option}" if option in options else f"{word} is a setting: write {key}=VALUE, without dashes"


def _is_setting(data: str) -> bool:
    """Whether the first argument is a key=value, and so not DATA."""
    from vitrail.training.config.aliases import ALIASES
    from vitrail.training.config.schema import KEYS

    name = data.partition("=")[0]
    return "=" in data and (name in KEYS or name in ALIASES) and not os.path.exists(data)


def _arguments(context: typer.Context, data: str | None, settings: list[str]) -> tuple[str | None, dict[str, Any]]:
    """DATA and the keyword arguments of the library's `train`. Options that were not given are None or False."""
    from vitrail.errors import ConfigError
    from vitrail.training.config.schema import parse_overrides

    options = {
        name: value
        for name, value in context.params.items()
        if value is not None and (value is not False or name == "pretrained")
    }
    for name, value in options.items():  # `--lr-find --img-size 64`: the first takes the second as its value
        if isinstance(value, str) and value.startswith("--"):
            raise ConfigError(f"--{name.replace('_', '-')} lacks its value: there is {value} instead")
    if data is not None and _is_setting(data):
        settings, data = [data, *settings], None  # DATA is among the settings, or the run or the recipe names it
    given: dict[str, Any] = {name: value for name, value in options.items() if name not in _NOT_PASSED_ON}
    overrides = parse_overrides(settings)
    if data is None:
        data = overrides.pop("data", None)
    elif "data" in overrides:
        raise ConfigError(f"DATA is given twice: as {data} and as data={overrides['data']}")
    if twice := given.keys() & overrides.keys():
        name = min(twice)
        raise ConfigError(f"{name} is given twice: as --{name.replace('_', '-')} and as {name}=")
    return data, given | overrides | {"command": context.obj}
