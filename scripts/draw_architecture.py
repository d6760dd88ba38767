"""Draws docs/architecture.svg: the packages of src/vitrail in the rows of the import rule, each with what it imports.

Usage: python scripts/draw_architecture.py [OUTPUT.svg]
"""

import ast
import sys
import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "vitrail"
PICTURE = ROOT / "docs" / "architecture.svg"

# From the top down; a package imports only from rows below its own. tests/test_imports.py has the same rows.
ROWS = (
    ("__main__",),
    ("cli",),
    ("service", "scale"),
    ("comparison", "diagnosis", "recommendation", "deploy"),
    ("training",),
    ("explanation",),
    ("classifier",),
    ("prediction", "feature_file"),
    ("evaluation",),
    ("reports",),
    ("inference",),
    ("pretrained",),
    ("data",),
    ("models",),
    ("weights",),
    ("layers",),
    ("images",),
    ("utils",),
    ("errors", "_version"),
)
ORDER = [name for row in ROWS for name in row]

WIDTH, MARGIN, GAP, PADDING, LINE = 960, 16, 10, 10, 17
CHARACTER = 6.7  # average width of a character at 12 px
STYLE = (
    "text{font:12px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;fill:#3c4043}"
    "text.name{font-weight:700;font-size:14px;fill:#1b1b1b}"
    "rect{fill:#eef3f8;stroke:#7d9bb8}rect.sub{fill:#ffffff}rect.page{fill:#ffffff;stroke:none}"
)


def imported_packages(path: Path) -> Iterator[str]:
    """Packages of vitrail that a file imports, function-level imports included, `if TYPE_CHECKING` excluded."""

    def visit(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from visit(child)

    for name in visit(ast.parse(path.read_text(encoding="utf-8"))):
        if name.startswith("vitrail."):
            yield name.split(".")[1]


def files_of(package: str) -> list[Path]:
    folder = SOURCE / package
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imports_of(files: list[Path], package: str) -> list[str]:
    """The other packages that these files of a package import, in the order of the rows."""
    found = {name for path in files for name in imported_packages(path)} - {package}
    return [name for name in ORDER if name in found]


def box(name: str, imports: list[str], x: float, y: float, width: float) -> tuple[str, float]:
    """A box with the package's name and its imports, and its height without subpackages."""
    text = "imports " + ", ".join(imports) if imports else "imports nothing of vitrail"
    lines = textwrap.wrap(text, int((width - 2 * PADDING) / CHARACTER))
    height = 2 * PADDING + LINE * (1 + len(lines))
    parts = [f'<text class="name" x="{x + PADDING:g}" y="{y + PADDING + 12:g}">{escape(name)}</text>']
    for i, line in enumerate(lines, 1):
        parts.append(f'<text x="{x + PADDING:g}" y="{y + PADDING + 12 + LINE * i:g}">{escape(line)}</text>')
    return "".join(parts), height


def rectangle(x: float, y: float, width: float, height: float, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<rect{kind} x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def draw_row(boxes: list[tuple[str, list[str], list[tuple[str, list[str]]]]], y: float) -> tuple[list[str], float]:
    """One row of packages (name, imports, subpackages), and its height."""
    width = (WIDTH - 2 * MARGIN - GAP * (len(boxes) - 1)) / len(boxes)
    drawn, heights, extents = [], [], []
    for i, (name, imports, subpackages) in enumerate(boxes):
        x = MARGIN + i * (width + GAP)
        text, height = box(name, imports, x, y, width)
        inner, top = [], y + height
        sub_width = (width - 2 * PADDING - 2 * GAP) / 3
        for start in range(0, len(subpackages), 3):
            group = [
                (j, *box(sub, needs, x + PADDING + j * (sub_width + GAP), top, sub_width))
                for j, (sub, needs) in enumerate(subpackages[start : start + 3])
            ]
            tallest = max(size for _, _, size in group)
            for j, sub_text, _ in group:
                inner += [rectangle(x + PADDING + j * (sub_width + GAP), top, sub_width, tallest, "sub"), sub_text]
            top += tallest + GAP
        heights.append(top - y)
        extents.append(x)
        drawn.append([text, *inner])
    height = max(heights)
    parts = []
    for x, texts in zip(extents, drawn, strict=True):
        parts += [rectangle(x, y, width, height), *texts]
    return parts, height


def draw() -> str:
    """The picture as SVG; equal for equal sources."""
    parts, y = [], float(MARGIN)
    for row in ROWS:
        boxes = []
        for package in row:
            files = [path for path in files_of(package) if path.exists()]
            if not files:
                continue  # planned, not there yet
            subpackages = []
            if package == "training":
                folders = sorted({path.parent for path in files} - {SOURCE / package})
                subpackages = [
                    (f"training/{folder.name}", imports_of(sorted(folder.glob("*.py")), package)) for folder in folders
                ]
            boxes.append((package, imports_of(files, package), subpackages))
        if boxes:
            drawn, height = draw_row(boxes, y)
            parts += drawn
            y += height + GAP
    height = y - GAP + MARGIN
    title = "The packages of vitrail, each above the packages that it imports"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" role="img" aria-label="{title}"><title>{title}</title><style>{STYLE}</style>'
    )
    page = f'<rect class="page" width="{WIDTH}" height="{height:g}"/>'
    return "\n".join([head, page, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    target.write_text(draw(), encoding="utf-8")
    print(target)
