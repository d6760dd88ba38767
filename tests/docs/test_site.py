"""The site builds without a warning and without a network, and has every page."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path / "html")]
    offline = {**os.environ, "https_proxy": "http://localhost:9", "http_proxy": "http://localhost:9"}
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        built = tmp_path / "html" / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.is_file()
        assert "http://" not in "".join(line for line in built.read_text().splitlines() if "<script" in line)
    settings = (tmp_path / "html" / "reference" / "settings.html").read_text()
    assert "learning_rate" in settings
    assert "peak learning rate" in settings
    assert "--epochs" in (tmp_path / "html" / "reference" / "commands.html").read_text()


def test_every_page_is_in_the_contents() -> None:
    """Quick, unlike the build: a page that no table of contents names is a warning there."""
    contents = (ROOT / "docs" / "index.md").read_text().splitlines()
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - {"index"} == {line for line in contents if line in pages}


def test_the_readme_begins_with_what_one_gets() -> None:
    """Within 25 lines: a picture of a report, the two commands, and whose the small models are."""
    head = (ROOT / "README.md").read_text().splitlines()[:25]
    pictures = [found[1] for line in head if (found := re.match(r"!\[.*report.*\]\((.+)\)", line))]
    assert pictures
    assert all((ROOT / picture).is_file() for picture in pictures)
    assert "own and not timm's" in " ".join(head)
    assert {"make demo", "make test"} <= {line.partition("  ")[0].rstrip() for line in head}
