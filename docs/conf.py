"""The site: `make docs` builds it with Sphinx, with warnings as errors and no network."""

import re
import sys
from importlib import import_module
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "src"))

project = "vitrail"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "vitrail"
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings write code between single backticks, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#]+)(#[^)]*)?\)")


def _settings() -> str:
    """The settings of `vitrail train`, a table for each section."""
    from vitrail.training.config.schema import FIELDS, SECTION_OF, SECTIONS
    from vitrail.utils.settings import format_value

    lines: list[str] = []
    for name, section in SECTIONS.items():
        title = (section.__doc__ or "").splitlines()[0]
        lines += [f"## {name}", "", title, ""]
        lines += ["| setting | default (a recipe may set another) | meaning |", "|---|---|---|"]
        for key, field in FIELDS.items():
            if SECTION_OF.get(key) == name:
                lines.append(f"| `{key}` | {format_value(field.default)} | {_cell(field.description or '')} |")
        lines.append("")
    return "\n".join(lines)


def _aliases() -> str:
    """Names of other libraries that stand for a setting."""
    from vitrail.training.config.aliases import ALIASES
    from vitrail.training.config.schema import KEYS

    names: dict[str, list[str]] = {}
    for alias, key in ALIASES.items():
        names.setdefault(key, []).append(f"`{alias}`")
    rows = [f"| `{key}` | {', '.join(found)} |" for key, found in sorted(names.items()) if key in KEYS]
    return "\n".join(["| setting | also understood as |", "|---|---|", *rows])


def _commands() -> str:
    """The commands with their options."""
    from typer.main import get_command

    from vitrail.cli.app import app

    lines: list[str] = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        about = re.sub(r"\n +", "\n", command.help or "")
        lines += [f"## vitrail {name}", "", about, "", "| option | meaning |", "|---|---|"]
        for parameter in command.params:
            option = parameter.param_type_name == "option"
            label = ", ".join(parameter.opts) if option else str(parameter.metavar or parameter.name)
            lines.append(f"| `{_cell(label)}` | {_cell(getattr(parameter, 'help', '') or '')} |")
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


_GENERATED = {"@SETTINGS@": _settings, "@ALIASES@": _aliases, "@COMMANDS@": _commands}


def _expand(app: Sphinx, docname: str, source: list[str]) -> None:
    """Fill in generated tables; links to files of the repository that are not part of the site become their paths."""
    page = DOCS / f"{docname}.md"

    def outside(found: re.Match[str]) -> str:
        target = (page.parent / found[2] / found[3]).resolve()
        if target.is_relative_to(DOCS):
            return found[0]
        if not target.exists():
            raise FileNotFoundError(f"{page}: the link to {target} leads nowhere")
        path = target.relative_to(DOCS.parent).as_posix()
        return found[1] if found[1].strip("`") == path else f"{found[1]} (`{path}`)"

    text = _OUTSIDE.sub(outside, source[0])
    for word, make in _GENERATED.items():
        if word in text:
            text = text.replace(word, make())
    source[0] = text


def _as_markdown_code(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are read as reStructuredText: asterisks and bars of running text are no markup."""
    lines[:] = [re.sub(r"(?<![`\w])(\*{1,2})(?=\w)", r"\\\1", line) for line in lines]


def setup(app: Sphinx) -> None:
    import_module("vitrail")
    app.connect("source-read", _expand)
    app.connect("autodoc-process-docstring", _as_markdown_code)
