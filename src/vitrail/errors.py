"""Errors that a person can mend."""

from collections.abc import Iterable
from difflib import get_close_matches


class VitrailError(Exception):
    """A mistake of the user's, or of the world around them. Its text is one line: what is wrong and what to do.

    The command line prints it without a traceback and leaves with status 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'a' or 'b'?)" with the nearest of `known`, or "" where nothing is near."""
    near = get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(name) for name in near)}?)" if near else ""
