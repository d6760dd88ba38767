"""The named recipes: every key is known, nothing is left open, a rate goes with its batch size, and each trains."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from training import tiny
from vitrail.errors import ConfigError
from vitrail.training.config.recipes import find_recipe, named_recipe, rates_for, recipe_names
from vitrail.training.config.schema import FIELDS, KEYS, SECTION_OF, TrainConfig, make_config, read_config
from vitrail.training.run import train
from vitrail.training.setup import prepare

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "src" / "vitrail" / "training" / "config" / "named_recipes"
# What every recipe says, if only that it is off.
NAMED = {
    "epochs", "batch_size", "lr", "min_lr", "warmup_epochs", "weight_decay", "betas", "clip_grad", "layer_decay",
    "head_lr", "backbone_lr", "loss", "label_smoothing", "drop", "drop_path", "crop_scale", "flip", "rand_augment",
    "erase", "mixup", "cutmix", "repeats", "ema",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def test_the_papers_recipes_are_there() -> None:
    papers = {"deit", "augreg", "swin", "finetune", "plain", "small", "resnet-a2"}
    assert papers <= set(recipe_names())
    assert set(recipe_names()) == {path.stem for path in FOLDER.glob("*.toml")}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_a_recipe_is_complete(name: str) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}: ")
    assert "\n# from " in text
    written, read = tomllib.loads(text), named_recipe(name).settings
    assert {key: name for name, keys in written.items() for key in keys} == {key: SECTION_OF[key] for key in read}
    assert read.keys() >= NAMED
    assert not [key for key in read if SECTION_OF.get(key) in ("data", "model", None)]
    assert read["epochs"]
    assert read["warmup_epochs"] <= read["epochs"] / 10


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_a_misspelt_key_names_the_nearest(name: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    for key in named_recipe(name).settings:
        wrong = tmp_path / "wrong.toml"
        wrong.write_text(text.replace(f"\n{key} =", f"\n{key}s ="), encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"'{key}s'.*did you mean.*'{key}'"):
            read_config(wrong)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_what_a_recipe_does_not_name_is_off(name: str) -> None:
    """Whatever would be chosen for the images: here digits, which would be turned and sheared."""
    given = {"recipe": name, "model": "vit_nano_patch2_8", "batch_size": named_recipe(name).settings["batch_size"]}
    config, settings = prepare("digits", make_config(given)).config, named_recipe(name).settings
    for key in KEYS:
        if SECTION_OF.get(key) not in ("data", "model") and key not in ("recipe", "workers", "cache"):
            assert config.flat[key] == settings.get(key, FIELDS[key].default), key


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.toml")))
def test_a_recipe_trains(name: str) -> None:
    """A step on few and small images: its batch is made to suit them, and its rate to suit the batch."""
    setup = prepare(tiny.dataset(), make_config({"recipe": name, "model": tiny.VARIANT.name, "device": "cpu"}))
    settings = named_recipe(name).settings
    assert setup.config.schedule.batch_size == 8
    assert setup.config.optimizer.lr == pytest.approx(settings["lr"] * (8 / settings["batch_size"]) ** 0.5, rel=1e-2)
    assert f"recipe {name}: {settings['epochs']:g} epochs of 50 images in batches of 8, lr " in setup.reasons[0]
    one = tiny.session(recipe=name, epochs=1, batch_size=12)
    for batch in one.loader.epoch(0):
        one.trainer.step(batch)
    assert one.trainer.mean_loss() < 3


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"'diet' \(did you mean 'deit'") as error:
        find_recipe("diet")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"not/there\.toml"):
        find_recipe("not/there.toml")
    with pytest.raises(ConfigError, match=r"did you mean 'swin'"):
        train("digits", recipe="swing", progress=False)


def test_rates_go_with_the_root_of_the_batch() -> None:
    settings = {"batch_size": 256, "lr": 1e-3, "head_lr": 4e-3, "backbone_lr": None, "min_lr": 1e-5}
    assert rates_for(64, settings) == {"lr": 5e-4, "head_lr": 2e-3, "min_lr": 5e-6}
    assert rates_for(256, {"batch_size": 256, "lr": 1.23456789e-3}) == {"lr": 1.23456789e-3}


def test_a_recipe_by_name_is_run_and_noted(tmp_path: Path) -> None:
    keys = {"model": tiny.VARIANT.name, "epochs": 1, "device": "cpu"}
    train(tiny.dataset(), recipe="deit", out=tmp_path / "run", progress=False, seed=3, **keys)
    config = read_config(tmp_path / "run" / "config.toml")
    assert (config.recipe, config.augment.rand_augment, config.augment.repeats, config.seed) == ("deit", 9, 3, 3)
    assert (config.schedule.epochs, config.schedule.warmup_epochs) == (1, 0.1)


def test_keys_win_over_the_recipe() -> None:
    chosen = prepare("digits", make_config({"recipe": "deit", "batch_size": 256, "mixup": 0.1, "budget": 60})).config
    assert (chosen.augment.mixup, chosen.augment.cutmix) == (0.1, 1.0)
    assert (chosen.optimizer.lr, chosen.schedule.min_lr) == (5e-4, 5e-6)
    assert chosen.schedule.epochs is None
    assert prepare("digits", make_config({"recipe": "deit", "batch_size": 256, "lr": 3e-3})).config.optimizer.lr == 3e-3


def config_of(folder: Path, recipe: Path, **keys: object) -> TrainConfig:
    train(tiny.dataset(), recipe=recipe, out=folder, progress=False, **{"epochs": 0, "device": "cpu", **keys})
    return read_config(folder / "config.toml")


def test_a_files_rate_belongs_to_its_batch_size(tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f"model = '{tiny.VARIANT.name}'\nbatch_size = 16\nlr = 1e-3\nhead_lr = 2e-3\nflip = 0.25\n")
    own = config_of(tmp_path / "a", recipe)
    assert (own.schedule.batch_size, own.augment.flip) == (16, 0.25)
    assert (own.optimizer.lr, own.optimizer.head_lr) == (1e-3, 2e-3)
    assert own.augment.rotate == 12.0  # chosen: a file of one's own need not be complete
    other = config_of(tmp_path / "b", recipe, batch_size=4)
    assert (other.schedule.batch_size, other.optimizer.lr, other.optimizer.head_lr) == (4, 5e-4, 1e-3)
    assert config_of(tmp_path / "c", recipe, batch_size=4, lr=3e-3).optimizer.lr == 3e-3
    recipe.write_text(f"model = '{tiny.VARIANT.name}'\nbatch_size = 50\nlr = 1e-3\n")  # all images in a step
    assert config_of(tmp_path / "e", recipe).schedule.batch_size == 50
    recipe.write_text(f"model = '{tiny.VARIANT.name}'\nlr = 1e-3\n")  # of no batch size
    assert config_of(tmp_path / "d", recipe, batch_size=4).optimizer.lr == 1e-3


def test_a_file_may_say_what_is_different_from_a_named_one(tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f"recipe = 'swin'\nmodel = '{tiny.VARIANT.name}'\nmixup = 0.3\n")
    config = config_of(tmp_path / "a", recipe, batch_size=16)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.rotate) == (0.3, 1.0, 0.0)
    assert config.optimizer.lr == 1.25e-4
    assert config.recipe == str(recipe)
    recipe.write_text("recipe = 'swim'\n")
    with pytest.raises(ConfigError, match=r"own\.toml: .*'swim' \(did you mean 'swin'"):
        find_recipe(recipe)


def test_a_runs_config_is_a_recipe(tmp_path: Path) -> None:
    keys = {"model": tiny.VARIANT.name, "epochs": 0, "device": "cpu", "lr": 0.0123456}
    train(tiny.dataset(), recipe="small", out=tmp_path / "a", progress=False, **keys)
    first = read_config(tmp_path / "a" / "config.toml")
    second = config_of(tmp_path / "b", tmp_path / "a" / "config.toml")
    assert second.model_copy(update={"recipe": first.recipe}) == first


def test_a_file_may_ask_for_a_probe_and_a_named_recipe_may_not(tmp_path: Path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text(f"probe = true\nmodel = '{tiny.VARIANT.name}'\ndevice = 'cpu'\n")
    assert train(tiny.dataset(), recipe=recipe, out=tmp_path / "a", progress=False).report
    with pytest.raises(ConfigError, match=r"^recipe .* probe"):
        train(tiny.dataset(), recipe="deit", probe=True, out=tmp_path / "b", progress=False)
    recipe.write_text("probe = true\nbatch_size = 8\nlr = 1e-3\n")
    with pytest.raises(ConfigError, match=r"^(lr|batch_size) .* probe"):
        train(tiny.dataset(), recipe=recipe, out=tmp_path / "c", progress=False)


@pytest.mark.slow
def test_a_wheel_has_the_recipes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"  # building leaves things behind
    shutil.copytree(ROOT / "src", tree / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(tree)], check=True)
    (built,) = tmp_path.glob("*.whl")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "from vitrail.training.config import recipes as r; "
        "print(r.__file__, *r.recipe_names(), r.named_recipe('deit').settings['lr'])"
    )
    with zipfile.ZipFile(built) as wheel:
        wheel.extractall(tmp_path / "site")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "site/vitrail/training/config/recipes.py"), *recipe_names(), "0.001"]
