"""Imports point one way, downwards in the layout's table, and what needs no torch does not load it."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitrail

ROOT = Path(vitrail.__file__).parent

# From the top down. A module may import from its own package and from lines below its own.
LAYERS = (
    {"cli"},
    {"serve", "compare", "explain", "deploy", "training", "features", "push"},
    {"classifier"},
    {"sources"},
    {"model_folder"},
    {"card"},
    {"timm_config", "inputs"},
    {"data"},
    {"models"},
    {"weights"},
    {"layers"},
    {"preprocess"},
    {"pixels", "randomness", "files"},
    {"errors"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Upward, inside a function: what a classifier or a model offers and does not need to exist.
UPWARD = {("classifier", "training"), ("models", "sources")}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST, *, at_start: bool = False) -> Iterator[str]:
    """Modules of vitrail's that the code imports, without its name; `at_start`: only those outside functions. What
    stands under `if TYPE_CHECKING` is never imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("vitrail.") for alias in node.names if alias.name.startswith("vitrail"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "vitrail":
                yield from (alias.name for alias in node.names)
            elif node.module and node.module.startswith("vitrail."):
                yield node.module.removeprefix("vitrail.")
        yield from imported(node, at_start=at_start)


def test_every_part_has_a_place_in_the_table() -> None:
    parts = {name.split(".")[0] for name, _ in modules()} - {"__init__", "__main__"}
    assert parts - RANK.keys() == set()


@pytest.mark.parametrize("part", sorted({name.split(".")[0] for name, _ in modules()} - {"__init__", "__main__"}))
def test_imports_point_downwards(part: str) -> None:
    wrong = set()
    for name, tree in modules():
        if name.split(".")[0] != part:
            continue
        for target in imported(tree):
            other = target.split(".")[0]
            if other not in (part, "__version__") and (part, other) not in UPWARD and RANK[other] <= RANK[part]:
                wrong.add((name, target))
    assert wrong == set()


def test_upward_imports_are_inside_functions() -> None:
    for name, tree in modules():
        for target in imported(tree, at_start=True):
            assert (name.split(".")[0], target.split(".")[0]) not in UPWARD, (name, target)


@pytest.mark.parametrize(
    "code",
    [
        "import vitrail; vitrail.__version__; dir(vitrail); vitrail.VitrailError; vitrail.Preprocess",
        "import vitrail; vitrail.list_models('swin*')",
        "import vitrail.training.choose, vitrail.training.recipes as r; r.named_recipe('deit')",
        "from vitrail.cli import main; main(['--help'])",
        "from vitrail.cli import main; main(['--version'])",
        "from vitrail.cli import main; main(['train', '--help'])",
        "from vitrail.cli import main; main(['models'])",
        "from vitrail.cli import main; main(['models', '--json'])",
        "from vitrail.cli import main; main(['models', 'no such model'])",
    ],
)
def test_what_needs_no_torch_does_not_load_it(code: str) -> None:
    heavy = "{'torch', 'numpy', 'sklearn', 'PIL', 'torchvision', 'timm'}"
    check = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_predicting_loads_nothing_that_it_does_not_need() -> None:
    """What costs time and memory at every start; typer loads pydantic by itself."""
    code = (
        "import sys, numpy as np, vitrail.cli\n"
        "from vitrail.classifier import Classifier\nfrom vitrail.models.create import create_model\n"
        "from vitrail.preprocess import Preprocess\n"
        "model = create_model('vit_nano_patch2_8')\n"
        "clf = Classifier(model, Preprocess(size=(8, 8)), [str(k) for k in range(10)])\n"
        "clf.predict(np.zeros((9, 9, 3), np.uint8))\n"
        "print(sorted(name for name in sys.modules if name in {'sklearn', 'scipy', 'huggingface_hub', 'requests', "
        "'torchvision', 'timm', 'transformers', 'torch._dynamo', 'rich.progress', 'vitrail.data.catalog', "
        "'vitrail.sources.pretrained', 'vitrail.card', 'vitrail.training.run'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_names_of_the_package_are_there() -> None:
    for name in vitrail.__all__:
        assert getattr(vitrail, name) is getattr(vitrail, name)
    assert callable(vitrail.train)
    assert issubclass(vitrail.Classifier, object)
    assert set(vitrail.__all__) <= set(dir(vitrail))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        vitrail.trian  # noqa: B018


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text())["project"]
    assert vitrail.__version__ == project["version"]
