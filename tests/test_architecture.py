"""docs/architecture.svg shows the packages and imports of the source."""

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
