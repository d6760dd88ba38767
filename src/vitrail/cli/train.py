"""`vitrail train`."""

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def _print_help(context: typer.Context, wanted: bool) -> None:
    """The usual help, and then every key of the config, read from the config itself."""
    if not wanted:
        return
    if text := context.get_help():  # typer may have printed it already
        print(text.rstrip())
    from rich.console import Console
    from rich.panel import Panel

    from vitrail.training.config.schema import FIELDS

    options = {parameter.name for parameter in context.command.params}
    keys = {key: field for key, field in FIELDS.items() if key not in options}
    panel = Panel(
        _table({key: (field.default, field.description or "") for key, field in keys.items()}),
        title="Settings (key=value)",
        title_align="left",
        border_style="dim",
    )
    Console().print(panel)
    raise typer.Exit


def _table(keys: dict[str, tuple[object, str]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for style in ("cyan", "dim", ""):
        table.add_column(style=style, overflow="fold")
    for key, (default, meaning) in keys.items():
        table.add_row(key, _words(default), meaning)
    return table


def _words(value: object) -> str:
    """A default as it would be written on the command line."""
    if isinstance(value, tuple):
        return ",".join(_words(part) for part in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


_OF_THE_COMMAND = {"data", "settings", "json", "help", "verify_resume"}  # parameters that are handled here


def train(
    context: typer.Context,
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA", help="A folder, CLASS/*.jpg; a dataset's name; wds: or hf-dataset:.", show_default=False
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="key=value...", help="Any other setting, such as lr=1e-3; see below.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="A name from `vitrail models`; by default one that suits.")
    ] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights.")] = False,
    weights: Annotated[str | None, typer.Option(help="Start from these weights.")] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Learn from this model too; see distill= below.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Freeze the model; fit a linear head to its features, computed once.")
    ] = False,
    img_size: Annotated[str | None, typer.Option(metavar="SIZE", help="What the model sees: 384, or 320x192.")] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="HOW", help="crop, pad or squash images that have another shape.")
    ] = None,
    balance: Annotated[
        str | None, typer.Option(metavar="HOW", help="sample or loss: give classes with few images their due.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The run folder; by default runs/DATA-MODEL.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training images.")] = None,
    budget: Annotated[str | None, typer.Option(help="How long, instead: 90s, 10m, 2h.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random but the split.  [default: 0]")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="deit, swin, augreg, plain, small, finetune, ..., or a TOML file."),
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Go on with the run in this folder.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Where a named dataset's files are.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps.  [default: the best that is there]")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Tell what became of every tensor of the weights.")
    ] = False,
    show_batch: Annotated[
        str | None,
        typer.Option(metavar="PNG", help="Draw what the model would see in the first batch, and train nothing."),
    ] = None,
    verify_resume: Annotated[
        bool, typer.Option("--verify-resume", help="Prove in a minute that a killed run goes on as it was.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the run's summary as JSON.")] = False,
    help: Annotated[  # typer's own would end before the keys
        bool, typer.Option("--help", "-h", callback=_print_help, is_eager=True, help="Show this message and exit.")
    ] = False,
) -> int:
    """Train a model on images, or fine-tune one, and leave a run folder behind.

    Model and settings suit the images unless you name them. Ctrl-C saves the run; `--resume` goes on.

    Example: `vitrail train photos/ --pretrained --epochs 10 --out runs/photos`
    """
    from vitrail.training.config.schema import parse_overrides

    words = list(settings or [])
    if data is not None and "=" in data and (resume or recipe) and not os.path.exists(data):
        # No DATA, as the run or the recipe knows it.
        words, data = [data, *words], None
    values: dict[str, Any] = parse_overrides(words)
    # Every option is a parameter of `train`, by the same name; what was not asked for is None or False.
    asked = {name: value for name, value in context.params.items() if value is not None and value is not False}
    given = {name: value for name, value in asked.items() if name not in _OF_THE_COMMAND} | {"command": context.obj}
    twice = given.keys() & values.keys()
    if twice:
        from vitrail.errors import VitrailError

        name = min(twice)
        raise VitrailError(f"{name} is given twice: as --{name.replace('_', '-')} and as {name}=")
    if verify_resume:
        from vitrail.training.verify_resume import verify_resume as verify

        verdict = verify(data, **given, **values)
        print(verdict)
        return 0 if verdict.same else 1
    from vitrail.training import train as run
    from vitrail.training.engine.interrupt import Stopped

    try:
        classifier = run(data, **given, **values)
    except Stopped as stopped:  # typer would take it for Ctrl-C, whatever it was
        return 128 + stopped.signal
    if json and show_batch is None:
        from json import dumps

        print(dumps(classifier.report, indent=2, ensure_ascii=False))
    return 0
