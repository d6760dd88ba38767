"""The extras can be installed under constraints.txt, and messages say how."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vitrail.errors import how_to_install

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

_OF_TORCH = ("nvidia-", "cuda-", "triton")  # which torch's build for GPUs pins itself


def name_of(package: str) -> str:
    """A package's normalised name (PEP 503), of "typing_extensions==4.1" too."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", package)[0]).lower()


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_all_extras_resolve_together_and_so_does_each(tmp_path: Path) -> None:
    """Each package is pinned, so that an extra alone resolves to a part of the same releases."""
    if pip("index", "versions", "packaging").returncode:
        pytest.skip("no package index can be reached")
    lines = [line for lines in EXTRAS.values() for line in lines if not line.startswith("vitrail[")]
    report, constraints = tmp_path / "report.json", str(ROOT / "constraints.txt")
    resolved = pip(
        *("install", "--dry-run", "--ignore-installed", "--quiet", "-c", constraints, "--report", str(report)),
        *PROJECT["dependencies"],
        *lines,
    )
    assert resolved.returncode == 0, resolved.stderr
    found = {
        (name_of(item["metadata"]["name"]), item["metadata"]["version"].partition("+")[0])
        for item in json.loads(report.read_text())["install"]
    }
    pins = [line.split("==") for line in Path(constraints).read_text().splitlines() if "==" in line]
    assert {name_of(line) for line in lines} <= {name for name, _ in found}
    unpinned = found - {(name_of(name), version) for name, version in pins}
    assert not {name for name, _ in unpinned if not name.startswith(_OF_TORCH)}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_packages_of_extras_are_pinned(extra: str) -> None:
    pins = {name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {name_of(line) for line in EXTRAS[extra]} - {"vitrail"} <= pins


def test_how_to_install_names_a_clone_and_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.13",
        'datasets>=4; extra == "hf"',
        "timm>=1; extra == 'guests'",
        'torchvision; extra == "guests"',
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert how_to_install("hf") == (
        "pip install -c constraints.txt -e '.[hf]' in a clone of vitrail, or pip install 'datasets>=4'"
    )
    assert how_to_install("guests").endswith("or pip install 'timm>=1' 'torchvision'")


def test_no_message_or_page_installs_vitrail_from_an_index() -> None:
    texts = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.html"), *(ROOT / "docs").rglob("*.md")]
    wrong = [path for path in [*texts, ROOT / "README.md"] if re.search(r"pip install '?vitrail", path.read_text())]
    assert [path.name for path in wrong] == ["errors.py"]  # whose comment says that it finds nothing
