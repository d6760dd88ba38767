import json
import shutil

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from vitrail.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for c in range(2):
        (root / f"class{c}").mkdir()
        whole = load_sample_image(("china.jpg", "flower.jpg")[c])
        for number in range(15):
            y, x = 100 + 106 * (number // 5), 128 * (number % 5)  # below the sky, of which two parts are alike
            Image.fromarray(whole[y : y + 104, x : x + 124]).save(root / f"class{c}" / f"{number:02d}.png")
    return root


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(["doctor", *map(str, arguments), "--forecast-model", "none"])
    return exit.value.code


def test_clean_data_exit_with_0_and_errors_with_3(folder, tmp_path, capsys):
    assert run(folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 30
    dirty = tmp_path / "dirty"
    shutil.copytree(folder, dirty)
    shutil.copy(dirty / "class0/00.png", dirty / "class1/again.png")
    assert run(dirty, "--out", tmp_path / "page.html", "--fix", tmp_path / "fixes.csv") == 3
    out = capsys.readouterr()
    assert "conflicting_label" in out.out
    assert "again.png" in out.out
    assert (tmp_path / "page.html").is_file()
    assert (tmp_path / "fixes.csv").is_file()


def test_a_mistake_is_one_line(tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
