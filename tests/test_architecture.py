"""docs/architecture.svg shows the packages and imports of the source."""

import re
import runpy
from pathlib import Path

from test_imports import ROWS

ROOT = Path(__file__).parents[1]


def test_the_picture_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw_architecture.py"))
    assert [set(row) for row in script["ROWS"]] == list(ROWS)
    assert (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8") == script["draw"](), (
        "docs/architecture.svg is out of date: run `python scripts/draw_architecture.py`"
    )


def test_every_file_and_name_in_the_text_exists() -> None:
    """`folder/file.py: Class.method` and `folder/file.py` in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    references = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", text)
    assert len(references) > 40
    for file, name in references:
        path = next((base / file for base in (ROOT / "src" / "vitrail", ROOT) if (base / file).is_file()), None)
        if path is None:  # the second file of a sentence about one package, without its folder
            assert list((ROOT / "src" / "vitrail").rglob(file)), f"docs/architecture.md: there is no file {file}"
            continue
        source = path.read_text(encoding="utf-8")
        for part in name.split(".") if name else []:
            assert re.search(rf"\b(def|class) {part}\b|^{part}\b.* = ", source, re.M), (
                f"docs/architecture.md: {file} has no {part}"
            )
