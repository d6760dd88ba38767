"""HTML pages: one file each, without scripts or external resources, from a template that extends `base.html`.

Importing this imports neither jinja2 nor torch.
"""

from pathlib import PurePath
from typing import Any
from unicodedata import category

_BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # characters that change the direction of writing


def render_page(package: str, template: str, values: dict[str, Any]) -> str:
    """Fill a template of `package`/templates; `base.html`, `macros.html` and `style.css` come from this package.

    All strings are escaped, and unprintable characters in them are made visible.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("vitrail.reports")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short_path"] = short_path
    return escape_unprintable(environment.get_template(template).render(**values))


def escape_unprintable(text: str) -> str:
    """The text with control characters, bidirectional overrides and surrogates as visible escapes, such as \\x00."""
    return "".join(c if c == "\n" or not _unprintable(c) else c.encode("unicode_escape").decode() for c in text)


def _unprintable(character: str) -> bool:
    return category(character) in ("Cc", "Cs") or character in _BIDI


def short_path(path: str) -> str:
    """The last two parts of a path: folder and file."""
    return "/".join(PurePath(path).parts[-2:])
