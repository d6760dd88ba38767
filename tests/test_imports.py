"""Imports point one way, downwards in the layout's table, file by file; and what needs no torch does not load it."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vitrail

ROOT = Path(vitrail.__file__).parent

# From the top down. A file imports from its own package and from rows below its own; no two files in a circle.
ROWS = (
    {"__main__"},
    {"cli"},
    {"service", "scale"},
    {"comparison", "diagnosis", "recommendation", "deploy"},
    {"training"},
    {"explanation"},
    {"classifier"},
    {"prediction", "feature_file"},
    {"evaluation"},
    {"reports"},
    {"inference"},
    {"pretrained"},
    {"data"},
    {"models"},
    {"weights"},
    {"layers"},
    {"images"},
    {"utils"},
    {"errors", "_version"},
)
RANK = {package: rank for rank, packages in enumerate(ROWS) for package in packages}


def find_modules() -> dict[str, Path]:
    """Every module below vitrail by its name without "vitrail."; the package itself, which names its public face, is
    left out."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in found.items() if name}


MODULES = find_modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of vitrail that the code imports, also inside functions. What stands under `if TYPE_CHECKING` is never
    imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("vitrail."):
                yield as_module(name.removeprefix("vitrail."))
        yield from imported(node)


def as_module(name: str) -> str:
    """The module in which a dotted name lies."""
    while name not in MODULES:
        name, dot, _ = name.rpartition(".")
        assert dot, f"no module of vitrail holds {name}: import it from where it is defined"
    return name


def imports_of(name: str) -> set[str]:
    return set(imported(ast.parse(MODULES[name].read_text(encoding="utf-8")))) - {name}


def test_every_package_has_a_row() -> None:
    assert {name.split(".")[0] for name in MODULES} - RANK.keys() == set()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    package = name.split(".")[0]
    others = {target for target in imports_of(name) if target.split(".")[0] != package}
    assert {target for target in others if RANK[target.split(".")[0]] <= RANK[package]} == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({name: imports_of(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_files_functions_and_folders_stay_small() -> None:
    files = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in files.items() if lines > 400} == {}
    folders = {path.parent for path in MODULES.values()}
    assert {folder.name for folder in folders if len(list(folder.glob("*.py"))) > 14} == set()
    functions = {
        f"{name}:{node.name}": node.end_lineno - node.lineno + 1
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    }
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import vitrail; vitrail.__version__; dir(vitrail); vitrail.VitrailError; vitrail.Preprocess",
        "import vitrail; vitrail.list_models('swin*')",
        "import vitrail.training.config.automatic, vitrail.training.config.recipes as r; r.named_recipe('deit')",
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
        "from vitrail.classifier import Classifier\nfrom vitrail.models.build import build_model\n"
        "from vitrail.models.catalog import variant\n"
        "from vitrail.images.preprocess import Preprocess\n"
        "model = build_model(variant('vit_nano_patch2_8').config)\n"
        "clf = Classifier(model, Preprocess(size=(8, 8)), [str(k) for k in range(10)])\n"
        "clf.predict(np.zeros((9, 9, 3), np.uint8))\n"
        "print(sorted(name for name in sys.modules if name in {'sklearn', 'scipy', 'huggingface_hub', 'requests', "
        "'torchvision', 'timm', 'transformers', 'torch._dynamo', 'rich.progress', 'vitrail.data.catalog', "
        "'vitrail.pretrained.load', 'vitrail.pretrained.model_card', 'vitrail.training.run'}))"
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
