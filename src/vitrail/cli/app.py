"""The `vitrail` command: its sub-commands and how errors are reported. Commands import what they need when they run."""

import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import wraps
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from vitrail.cli.commands.compare import compare
from vitrail.cli.commands.doctor import doctor
from vitrail.cli.commands.embed import embed
from vitrail.cli.commands.evaluate import evaluate
from vitrail.cli.commands.explain import explain
from vitrail.cli.commands.export import export
from vitrail.cli.commands.models import models
from vitrail.cli.commands.predict import predict
from vitrail.cli.commands.push import push
from vitrail.cli.commands.recommend import recommend
from vitrail.cli.commands.report import report
from vitrail.cli.commands.serve import serve
from vitrail.cli.commands.train import explain_option, train
from vitrail.cli.common.hints import other_command, other_option
from vitrail.errors import VitrailError
from vitrail.utils.memory import has_address_limit, is_out_of_memory, share_malloc_arena
from vitrail.utils.streams import lossy
from vitrail.utils.text import one_line, plain, printable

app = typer.Typer(
    name="vitrail",
    help="Train, evaluate and use Vision Transformers on your own images.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _stoppable(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """The same command, which on Ctrl-C prints the text of its KeyboardInterrupt; typer would end it without a word."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> int | None:
        try:
            return command(*arguments, **options)
        except KeyboardInterrupt as stop:
            print(plain(str(stop)) or "stopped", file=sys.stderr)
            return 130

    return run


app.command(add_help_option=False)(_stoppable(train))  # train has its own --help
for _command in (doctor, recommend, evaluate, predict, explain, embed, compare, export, serve, models, push, report):
    app.command()(_stoppable(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        from vitrail._version import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for an error, 4 if a training diverged, 130 for Ctrl-C, 143 for SIGTERM."""
    # PyTorch then uses huge pages on Linux: allocating a large batch in pages of 4 KiB takes longer than filling it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if has_address_limit():
        share_malloc_arena()  # the threads of a training would reserve 0.5 GB of addresses
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may not be valid UTF-8
    messages, sys.stderr = sys.stderr, lossy(sys.stderr)
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments  # in any position
    warnings.showwarning = _warn
    try:
        status = _run([argument for argument in arguments if argument != "--debug"], debug)
        try:
            sys.stdout.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at exit
            if not isinstance(error, BrokenPipeError):  # else the reader, such as `head`, has exited
                print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
                status = status or 2
    finally:
        sys.stderr = messages
    sys.exit(status)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Python's warnings as one line without the source location."""
    print(f"warning: {plain(str(message))}", file=sys.stderr)


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result: Any = app(
            arguments, prog_name="vitrail", standalone_mode=False, obj=shlex.join(["vitrail", *arguments])
        )
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of stdout has exited
        return 0
    except Exception as error:
        text = _explain(error)
        if text is None or debug:
            print(plain(traceback.format_exc()), end="", file=sys.stderr)
        if text != "" and not getattr(error, "reported_elsewhere", False):
            bug = f"{type(error).__name__}: {error}; this is a bug in vitrail, please report it with the lines above"
            print(f"error: {plain(text or bug)}", file=sys.stderr)
        return 1 if text is None else getattr(error, "exit_status", 2)


def _explain(error: Exception) -> str | None:
    """The message of a user's error, "" if it has been printed; None for a bug."""
    if isinstance(error, VitrailError):
        return str(error)
    if hasattr(error, "format_message"):  # typer: a wrong option or argument
        context = getattr(error, "ctx", None)
        if context and hasattr(error, "possibilities") and (option := getattr(error, "option_name", None)):
            if hint := other_option(option, context.command):
                return hint
            if context.command.name == "train":
                return explain_option(option, [name for each in context.command.params for name in each.opts])
        command = context.command_path if context else "vitrail"
        if not error.format_message():  # no command: typer has printed the help
            return ""
        return f"{other_command(error.format_message().rstrip('.'))} (see `{command} --help`)"
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "this needs PyTorch, which is not installed; predict, evaluate, embed and serve of an export do not"
    if is_out_of_memory(error):
        return (
            f"the memory does not suffice ({one_line(error, 160)}): use a smaller model, smaller images or batches, "
            "or a machine with more memory"
        )
    if isinstance(error, OSError) and error.strerror:
        where = f"{printable(str(error.filename))}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}"
    return None
