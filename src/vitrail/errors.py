"""The exceptions of this package: one tree, so that a program can catch the kind it means."""

import re
from collections.abc import Iterable
from difflib import get_close_matches


class VitrailError(Exception):
    """An error that the user can fix. The message is one line: what is wrong and what to do.

    The command line prints it without a traceback and exits with `exit_status`.
    """

    exit_status = 2


class DataError(VitrailError):
    """A dataset, split, table or image that is missing, unreadable or not usable as asked."""


class DataTypeError(DataError, TypeError):
    """Data or images of a type that is not taken."""


class ConfigError(VitrailError):
    """An unknown option, a value out of range, or options that exclude each other."""


class WeightsError(VitrailError):
    """Weights that could not be found, downloaded, verified or read, or that do not match the model."""


class DownloadError(DataError, WeightsError):
    """A download that failed. `status` is the HTTP status if the server answered with an error."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ModelError(VitrailError):
    """A model that does not exist, cannot be built, or cannot take the given input."""


class RunError(VitrailError):
    """A run folder or checkpoint that is missing, in use, finished or damaged, or a run that cannot go on."""


class DivergedError(RunError):
    """A training whose weights or validation loss never were finite: it ends without a model."""

    exit_status = 4


class ExportError(VitrailError):
    """An export that is damaged, or that failed verification."""


class DeviceError(VitrailError):
    """A device, runtime or optional package that is not available here, or memory that is exhausted."""


class DistributedError(VitrailError):
    """A setting that several processes cannot share, or a process that was lost."""


_PREFIX = 4  # letters of a name that are enough to tell which it begins


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """Return " (did you mean 'a' or 'b'?)" with those of `known` that begin with the word, else the closest; "" if none
    is as similar as `cutoff`."""
    word, known = word[:100].lower(), list(known)
    begun = [name for name in known if len(word) >= _PREFIX and name.lower().startswith(word)]
    close = begun[:3] or get_close_matches(word, known, n=3, cutoff=cutoff)
    return f" (did you mean {' or '.join(repr(name) for name in close)}?)" if close else ""


def how_to_install(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml needs, for messages.

    vitrail is on no package index, so `pip install 'vitrail[hf]'` finds nothing: a clone, or the packages by name.
    """
    from importlib.metadata import PackageNotFoundError, requires  # slow to import, and only needed for an error

    in_clone = f"pip install -c constraints.txt -e '.[{extra}]' in a clone of vitrail"
    try:
        lines = requires("vitrail") or []
    except PackageNotFoundError:  # run from the source tree
        return in_clone
    wanted = re.compile(rf""".*\bextra == ["']{re.escape(extra)}["']""")
    packages = [line.partition(";")[0].strip() for line in lines if wanted.match(line)]
    named = " ".join(f"'{package}'" for package in packages)
    return f"{in_clone}, or pip install {named}" if packages else in_clone
