"""What src imports is declared in pyproject.toml, what is declared is imported, and constraints.txt pins it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Extras whose packages are imported by name (importlib.import_module), or by another package.
BY_NAME = {
    "onnxscript",
    "timm",
    "torchvision",
    "wandb",
    "trackio",
    "tensorboard",
    "sphinx",
    "furo",
    "myst_parser",
}
OF_TORCH = {"triton"}  # in a file that only PyTorch's builds for CUDA reach: they pin it, and bring it
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}


def module(requirement: str) -> str:
    """The module that a requirement such as "scikit-learn>=1.4" installs."""
    name = re.split(r"[<>=!~\[; ]", requirement)[0]
    return MODULES.get(name, name.replace("-", "_"))


def imported() -> set[str]:
    """Top-level modules imported anywhere in src, also inside functions."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"vitrail"}


def test_imports_are_declared() -> None:
    extras = {module(line) for name, lines in EXTRAS.items() if name != "dev" for line in lines}
    assert imported() - OF_TORCH <= {module(line) for line in PROJECT["dependencies"]} | extras


def test_dependencies_are_imported() -> None:
    lines = [line for name, lines in EXTRAS.items() if name != "dev" for line in lines]
    assert {module(line) for line in [*PROJECT["dependencies"], *lines]} - imported() <= BY_NAME


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_core_dependencies_are_pinned(requirement: str) -> None:
    pins = {module(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert module(requirement).lower() in {pin.lower() for pin in pins}


def test_constraints_oldest_has_the_lowest_versions() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = {module(line).lower(): line.partition("==")[2] for line in lines if "==" in line}
    requirements = PROJECT["dependencies"] + [line for lines in EXTRAS.values() for line in lines if ">=" in line]
    lowest = {module(line).lower(): line.partition(">=")[2] for line in requirements}
    assert pinned.keys() >= {module(line).lower() for line in PROJECT["dependencies"]}
    assert {name: _release(version) for name, version in pinned.items()} == {
        name: _release(lowest[name]) for name in pinned
    }


def _release(version: str) -> tuple[int, ...]:
    """3.0 and 3.0.0 are the same release."""
    numbers = [int(part) for part in version.split(".")]
    while numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
