"""The style sheet and the script that pages share on which a person drops images: those of `vitrail serve` and of
exports for browsers."""

from importlib.resources import files

STYLE, SCRIPT = "page.css", "images.js"


def shared_file(name: str) -> bytes:
    """The content of STYLE or SCRIPT."""
    return (files("vitrail.reports.browser") / name).read_bytes()
