"""Every code block of README and documentation: Python and commands run on a few small images.

What would be long, needs a network or several processes, or never ends, is not run, for a reason given in `NOT_RUN`;
its command lines are parsed as the program parses them, so that an option or setting that does not exist fails.
"""

import ast
import glob
import importlib.util
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.main import get_command

from vitrail.cli import main
from vitrail.cli.app import app
from vitrail.training.config import automatic
from vitrail.training.config.schema import make_config, parse_overrides

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from doc_blocks import Block, read_blocks  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = {"", "text", "ini", "toml", "eval", "toctree"}  # languages of blocks that are not code

# Commands that are parsed and not run, and why.
NOT_RUN = {
    r"--pretrained|_patch16_224|patch14_dinov2|swin_tiny|timm:|hf:|--weights ms_in1k": "downloads weights",
    r"--recipe": "300 epochs",
    r"^vitrail compare|--budget|--verify-resume|--benchmark": "minutes; tests/comparison, tests/training",
    r"^vitrail serve": "runs until it is stopped; tests/service runs it",
    r"^vitrail push": "sends to the hub; tests/pretrained runs it",
    r"^vitrail export|exports/": "measures for half a minute; tests/deploy runs it",
    r"^vitrail recommend": "measures each candidate in a process of its own; tests/recommendation runs it",
    r"fashion-mnist|hf-dataset:|wds:|runs/pets|runs/explain|--features": "data that is not here; tests/data",
    r"--teacher runs/cnn|resnet20_32 --img-size 16": "a minute; scripts/draw_docs.py runs it",
    r"train photos/ --out runs/teacher|--teacher runs/teacher": "two trainings; tests/training/objectives runs them",
    r"labels\.csv": "tests/data/formats reads tables",
    r"lr=3e37|--resume": "is interrupted or fails on purpose; tests/training runs it",
}
# Blocks of Python that are compiled and not run, by a word in them, and why.
NOT_RUN_PYTHON = {
    "vitrail.recommend(": "as the command",
    "vitrail.compare(": "as the command",
    "vitrail.export(": "as the command",
    'vitrail.load("exports/photos")': "as the command",
    "vitrail.serve(": "as the command",
    "vitrail.train(frame": "tests/data/formats runs it",
    "ev.plot(": "tests/reports runs it",
    "tritonclient": "needs a running server; tests/service runs it",
    "AutoModelForImageClassification": "tests/pretrained/test_model_folder.py runs it",
    'load("runs/deit")': "scripts/draw_docs.py runs it",
    "maps = attention[:, :2, 2:]": "the same page",
}


def reason(text: str, table: dict[str, str]) -> str | None:
    return next((why for pattern, why in table.items() if re.search(pattern, text)), None)


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell; of a transcript, of the lines that begin with a dollar sign."""
    for line in block.text.splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def parse(words: list[str]) -> None:
    """Fail if a command, an option, a setting, a make target, an extra or a script does not exist."""
    program, *arguments = words
    if program == "torchrun":
        start = arguments.index("-m")
        program, arguments = arguments[start + 1], arguments[start + 2 :]
    if program == "vitrail":
        parse_vitrail(arguments)
    elif program == "make":
        assert re.search(rf"^{re.escape(arguments[0])}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        known = (ROOT / "pyproject.toml").read_text()
        for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            assert all(f"\n{extra} = [" in known for extra in extras.split(","))
    elif program == "python":
        parse_python(arguments)
    else:
        assert program in {"source", "cd", "git", "hf", "curl", "docker"}, f"what is {program}?"


def parse_python(arguments: list[str]) -> None:
    """`python -m benchmarks.NAME`: the module exists and knows the options; `python scripts/NAME.py` exists."""
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file()
        return
    module = arguments[1]
    if module.startswith("benchmarks"):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert all(f'"{word}"' in source for word in arguments[2:] if word.startswith("--"))
    else:
        assert importlib.util.find_spec(module.partition(".")[0]) is not None


def parse_vitrail(arguments: list[str]) -> None:
    name, *rest = arguments
    command: Any = get_command(app).commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, list(rest))
    if settings := context.params.get("settings"):
        make_config(parse_overrides(settings))


# Commands that several pages begin with: they are run once.
MADE = (
    "vitrail train photos/ --out runs/photos",
    "vitrail train digits --out runs/digits",
    "vitrail embed runs/photos holiday/ --out holiday.npy",
)


@pytest.fixture(scope="module")
def few_epochs() -> Iterator[None]:
    """Automatically chosen epochs: one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic, "RECIPES", tuple(replace(row, epochs=(1, 1)) for row in automatic.RECIPES))
        yield


@pytest.fixture(scope="module")
def place(few_epochs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the pages presume: photos/, holiday/, some images, and runs of one epoch."""
    root, draw = tmp_path_factory.mktemp("place"), np.random.default_rng(0)
    for number, label in enumerate(("cat", "dog", "owl")):
        (root / "photos" / label).mkdir(parents=True)
        for index in range(20):
            pixels = draw.integers(0, 100, (24, 32, 3)) + 50 * np.eye(3, dtype=int)[number]
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / label / f"{index}.jpg")
    for path in ("holiday/one.jpg", "holiday/two.jpg", "new/three.jpg", "a.jpg", "photo.jpg"):
        (root / path).parent.mkdir(exist_ok=True)
        shutil.copy(root / "photos/cat/0.jpg", root / path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for line in MADE:
            run(line.split())
        shutil.copytree("runs/digits", "runs/demo")
    spec = importlib.util.spec_from_file_location("sample_digits", ROOT / "scripts/sample_digits.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(root / "runs/demo-images")
    return root


def run(words: list[str]) -> None:
    """Run a command of vitrail in this process, after removing what an earlier page's twin has written."""
    for option in ("--out", "--fix", "--show-batch"):
        if option in words:
            path = Path(words[words.index(option) + 1])
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
    arguments = [found for word in words[1:] for found in (sorted(glob.glob(word)) if "*" in word else None) or [word]]
    if words[1] == "train":
        arguments += ["device=cpu"] if "--probe" in words else ["device=cpu", "cache=off", "batch_size=16"]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code in (0, 3), " ".join(words)  # 3: doctor has found the copies


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_block(page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block for block in read_blocks(page) if block.language not in TEXT]
    if not blocks:
        return
    monkeypatch.chdir(request.getfixturevalue("place"))
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    for block in blocks:
        if block.language == "python":
            tree = ast.parse(block.text)
            if not any(word in block.text for word in NOT_RUN_PYTHON):
                for out in re.findall(r"out='([^']+)'", ast.unparse(tree)):
                    shutil.rmtree(out, ignore_errors=True)
                exec(block.code(), names)
            continue
        assert block.language in {"sh", "console"}, f"{page}:{block.line}: a block in {block.language!r}"
        for words in commands(block):
            parse(words)
            line = " ".join(words)
            if words[0] == "vitrail" and block.language == "sh" and line not in MADE and not reason(line, NOT_RUN):
                run(words)


# What snippets within a page's text presume; a page of its own that is read from the top needs nothing.
PRELUDE = """
import json
from pathlib import Path
import numpy as np, vitrail
clf = vitrail.load("runs/photos")
"""


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_blocks_say_what_they_are(page: Path) -> None:
    """A block of commands or Python without a language would not be run."""
    for block in read_blocks(page):
        if block.language in TEXT:
            code = re.search(r"^(\$ )?(vitrail|make|pip|python|torchrun) |^(import|from) \w+", block.text, re.MULTILINE)
            assert code is None, f"{page}:{block.line}: {code}"


@pytest.mark.parametrize("table", [NOT_RUN, NOT_RUN_PYTHON])
def test_every_reason_is_used(table: dict[str, str]) -> None:
    text = "\n".join(
        " ".join(words) if table is NOT_RUN else block.text
        for page in PAGES
        for block in read_blocks(page)
        if (block.language == "python") != (table is NOT_RUN) and block.language not in TEXT
        for words in (commands(block) if table is NOT_RUN else [[]])
    )
    for pattern in table:
        found = re.search(pattern, text, re.MULTILINE) if table is NOT_RUN else pattern in text
        assert found, f"no block is left out for {pattern}"


@pytest.mark.parametrize(
    "command",
    [
        "vitrail train photos/ --no-such-option",
        "vitrail train photos/ no_such_setting=1",
        "vitrail nosuchcommand",
        "make nosuchtarget",
        "pip install -e '.[nosuchextra]'",
        "python -m benchmarks.comparison --no-such-option",
    ],
)
def test_what_does_not_exist_fails(command: str) -> None:
    with pytest.raises(Exception, match=r".*"):
        parse(shlex.split(command))
