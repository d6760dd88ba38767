"""Pushing to a hub on localhost that speaks the upload protocol: what arrives, byte for byte, and what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants

from vitrail.classifier import Classifier, load
from vitrail.cli import main
from vitrail.errors import ConfigError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ViTConfig
from vitrail.pretrained.push import plan_upload, push
from weights.hub_server import Hub
from weights.hub_upload import Uploads, receiving

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls httpx
FILES = ["README.md", "config.json", "model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Uploads]]:
    with receiving() as (server, uploads):
        uploads.tokens = {"writes": True, "reads": False}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", "writes")
        yield server, uploads


def save(folder: Path, seed: int = 0, **notes: object) -> Path:
    torch.manual_seed(seed)
    config = ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3)
    model = build_model(config)
    torch.nn.init.normal_(model.head.weight)
    return Classifier(model, Preprocess(size=(32, 32)), ("cat", "dog", "owl"), notes=notes).save(folder)


def refusal(model: Path, repo: str = "org/m", **options: object) -> str:
    with pytest.raises(WeightsError) as caught:
        push(plan_upload(model, repo), **options)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 300
    return text


def arrived(hub: Hub, repo: str = "org/m", revision: str = "main") -> dict[str, bytes]:
    return hub.repos[repo].commits[hub.repos[repo].revisions[revision]]


def test_what_is_sent_arrives_and_loads_from_there(hub: tuple[Hub, Uploads], tmp_path: Path) -> None:
    server, uploads = hub
    folder = save(tmp_path / "m")
    url = push(plan_upload(folder, "org/m"))
    files = arrived(server)
    assert sorted(files) == FILES
    for name in FILES[1:]:
        assert files[name] == (folder / name).read_bytes(), name
    assert url == f"{server.url}/org/m/commit/{server.repos['org/m'].revisions['main']}"
    assert [commit["summary"] for commit in uploads.commits] == ["Upload model with vitrail"]
    assert not server.repos["org/m"].private
    card = files["README.md"].decode()
    assert ModelCard(card).data.library_name == "timm"
    assert 'vitrail.load("hf:org/m")' in card
    assert "FOLDER" not in card
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    ours, back = (load(source).predict(image, top=3) for source in (folder, "hf:org/m"))
    assert ours == back


def test_options(hub: tuple[Hub, Uploads], tmp_path: Path) -> None:
    server, uploads = hub
    folder = save(tmp_path / "run" / "model")
    push(plan_upload(tmp_path / "run", "org/m"), private=True, revision="v2", message="The second")
    assert server.repos["org/m"].private
    assert sorted(arrived(server, revision="v2")) == FILES
    assert arrived(server) == {}
    assert uploads.commits[-1] == {"summary": "The second", "description": "", "revision": "v2", "create_pr": False}
    url = push(plan_upload(folder, "org/m"), create_pr=True)
    assert url.endswith("/discussions/1")
    assert sorted(arrived(server, revision="refs/pr/1")) == FILES
    assert arrived(server) == {}, "main waits for the pull request"
    before = len(uploads.stored)
    push(plan_upload(save(tmp_path / "other", seed=1), "org/m"), private=True)
    assert len(uploads.stored) == before + 1
    push(plan_upload(folder, "org/m"))
    assert len(uploads.stored) == before + 1, "weights that are there are not sent again"


def test_a_card_of_ones_own_is_sent_as_it_is(hub: tuple[Hub, Uploads], tmp_path: Path) -> None:
    server, _ = hub
    folder = save(tmp_path / "m")
    text = (folder / "README.md").read_text() + "\nBe kind to owls.\n"
    (folder / "README.md").write_text(text)
    push(plan_upload(folder, "org/m"))
    assert arrived(server)["README.md"].decode() == text
    (folder / "README.md").unlink()
    push(plan_upload(folder, "org/m"))
    assert b'"hf:org/m"' in arrived(server)["README.md"]


def test_no_path_of_this_machine_is_sent(hub: tuple[Hub, Uploads], tmp_path: Path) -> None:
    server, _ = hub
    notes = {"data": "/home/alice/photos", "source": "C:\\Users\\alice\\old.pth", "more": ["~/x/y", "a/b", 3]}
    folder = save(tmp_path / "m", **notes)
    push(plan_upload(folder, "org/m"))
    files = arrived(server)
    assert not [name for name in FILES[:2] if b"alice" in files[name]]
    sent = json.loads(files["config.json"])
    assert sent["vitrail"]["notes"] == {"data": "photos", "source": "old.pth", "more": ["y", "a/b", 3]}
    kept = json.loads((folder / "config.json").read_text())
    assert kept["vitrail"]["notes"] == notes
    assert {key: value for key, value in sent.items() if key != "vitrail"} == {
        key: value for key, value in kept.items() if key != "vitrail"
    }


def test_refusals(hub: tuple[Hub, Uploads], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = hub
    folder = save(tmp_path / "m")
    push(plan_upload(folder, "org/public"))
    assert "org/public already exists and is public" in refusal(folder, "org/public", private=True)
    assert "has no revision 'v9'" in refusal(folder, "org/public", revision="v9", create_pr=True)
    assert "the hub has no hf:org/none" in refusal(folder, "org/none", create_pr=True)
    monkeypatch.setenv("HF_TOKEN", "reads")
    assert "forbids access to hf:org/m: use a token with write permission" in refusal(folder)
    monkeypatch.setenv("HF_TOKEN", "old")
    assert "does not accept the token: `hf auth login`" in refusal(folder)
    monkeypatch.delenv("HF_TOKEN")
    asked = len(server.requests)
    assert "without a token: `hf auth login`, or set HF_TOKEN" in refusal(folder)
    monkeypatch.setenv("HF_TOKEN", "writes")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(folder)
    assert len(server.requests) == asked, "nothing was asked without need"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach the hub for hf:org/m" in refusal(folder)
    assert list(server.repos) == ["org/public"]


def test_a_file_that_arrives_damaged_is_no_success(hub: tuple[Hub, Uploads], tmp_path: Path) -> None:
    server, uploads = hub
    uploads.damage = True
    assert "the hub refuses hf:org/m: the content does not have this checksum" in refusal(save(tmp_path / "m"))
    assert arrived(server) == {}


@pytest.mark.parametrize("repo", ["m", "a/b/c", "../m", "org/..", "org/m od", "", "org/", "hf:org/m", "org/a--b"])
def test_names_of_nonsense(repo: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        plan_upload(save(tmp_path / "m"), repo)


def test_only_whole_model_folders_are_sent(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="none does not exist"):
        plan_upload(tmp_path / "none", "org/m")
    with pytest.raises(WeightsError, match="contains no model"):
        plan_upload(tmp_path, "org/m")
    folder = save(tmp_path / "m")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged"):
        plan_upload(folder, "org/m")


def test_the_command(hub: tuple[Hub, Uploads], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server, _ = hub
    folder = save(tmp_path / "m")

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["push", str(folder), *words])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    status, out, _ = run("org/m", "--dry-run", "--revision", "v1")
    assert status == 0
    assert server.requests == []
    lines = [line.split() for line in out.splitlines()]
    assert [name for _, name, *_ in lines[:-1]] == FILES
    assert int(lines[2][0].replace(",", "")) == (folder / "model.safetensors").stat().st_size
    assert "to upload to hf:org/m@v1" in out
    status, out, _ = run("org/m")
    assert (status, out) == (0, f"{server.url}/org/m/commit/{server.repos['org/m'].revisions['main']}\n")
    assert {name: len(content) for name, content in arrived(server).items()} == plan_upload(folder, "org/m").sizes()
    status, out, err = run("m")
    assert (status, out) == (2, "")
    assert err == "error: 'm' is not a repository name: use ORG/NAME or USER/NAME\n"
