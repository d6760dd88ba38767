"""The hub: a server on localhost that speaks its protocol, a filled cache, and no connection at all."""

import hashlib
import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, save

from vitrail.errors import WeightsError
from vitrail.models.build import build_model
from vitrail.pretrained.resolve import load_source
from vitrail.weights.published import PUBLISHED
from weights.checkpoints import all_cases, images, worst
from weights.hub_server import Hub, serving

CARD = b"---\ntags:\n- image-classification\nlicense: cc-by-4.0\n---\n# A model\n"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def files(**changes: Any) -> dict[str, bytes]:
    tensors = {key: value.clone() for key, value in all_cases()["timm vit"].content.items()}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "label_names": ["a", "b", "c", "d", "e"],
        "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9},
    }
    made = {"model.safetensors": save(tensors), "config.json": json.dumps(config).encode(), "README.md": CARD}
    return {**made, **changes}


def refusal(source: str) -> str:
    with pytest.raises(WeightsError) as error:
        load_source(source)
    assert str(error.value).isprintable()
    return str(error.value)


@torch.inference_mode()
def test_a_repository(hub: Hub) -> None:
    hub.add("org/model", files())
    loaded = load_source("hf:org/model")
    assert loaded.source == "hf:org/model@cccccccccccc"
    assert loaded.licence == "cc-by-4.0"
    assert loaded.architecture.class_names == ("a", "b", "c", "d", "e")
    assert loaded.architecture.preprocess is not None
    assert loaded.architecture.preprocess.crop_pct == 0.9
    assert loaded.architecture.config is not None
    model = build_model(loaded.architecture.config).eval()
    loaded.fit(model)
    assert worst(model(images()), all_cases()["timm vit"].reference(images())) <= 1e-5


def test_what_is_in_the_cache_needs_no_connection(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", files())
    load_source("hf:org/model")
    before = len(hub.requests)
    load_source(f"hf:org/model@{'c' * 40}")
    assert len(hub.requests) == before, "a commit does not change: nothing to ask"
    load_source("hf:org/model")
    assert not [r for r in hub.requests[before:] if "resolve" in r], "only what main is now was asked"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert load_source("hf:org/model").licence == "cc-by-4.0"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_source("hf:org/model").num_classes == 5


def test_revisions(hub: Hub) -> None:
    hub.add("org/model", files(), commit="a" * 40, revision="v1")
    hub.add("org/model", files(**{"README.md": CARD.replace(b"cc-by-4.0", b"mit")}), commit="b" * 40)
    assert load_source("hf:org/model@v1").source.endswith("@aaaaaaaaaaaa")
    assert load_source("hf:org/model").licence == "mit"
    hub.add("org/model", files(), commit="d" * 40)
    assert load_source("hf:org/model").source.endswith("@dddddddddddd"), "main moved"


def test_a_download_that_is_cut_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("org/model", files())
    hub.cut = 1
    assert load_source("hf:org/model").num_classes == 5
    assert hub.ranges, "it did not begin again"


def test_what_does_not_match_its_checksum_is_removed(hub: Hub) -> None:
    hub.add("org/model", files())
    hub.lie = True
    assert "damaged in the download" in refusal("hf:org/model")
    hub.lie = False
    assert load_source("hf:org/model").num_classes == 5


def test_several_files(hub: Hub) -> None:
    tensors = dict(all_cases()["timm vit"].content)
    half = len(tensors) // 2
    parts = {"one.safetensors": dict([*tensors.items()][:half]), "two.safetensors": dict([*tensors.items()][half:])}
    table = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    made = files(**{name: save(part) for name, part in parts.items()})
    del made["model.safetensors"]
    made["model.safetensors.index.json"] = json.dumps(table).encode()
    hub.add("org/model", made)
    assert set(load_source("hf:org/model").tensors) == set(tensors)
    table["weight_map"]["norm.weight"] = "../../../../etc/passwd"
    hub.add("org/evil", {**made, "model.safetensors.index.json": json.dumps(table).encode()})
    assert "outside its folder" in refusal("hf:org/evil")
    assert not [request for request in hub.requests if "passwd" in request]


def test_one_checkpoint_of_any_name_and_no_more(hub: Hub) -> None:
    made = files()
    hub.add("org/one", {"vit_tiny.safetensors": made["model.safetensors"], "training_args.bin": b"x"})
    assert load_source("hf:org/one").num_classes == 5
    hub.add("org/two", {"a.safetensors": b"x", "b.safetensors": b"x"})
    assert "(a.safetensors, b.safetensors)" in refusal("hf:org/two")
    hub.add("org/none", {"README.md": CARD})
    assert "no weights" in refusal("hf:org/none")


def test_refusals(hub: Hub) -> None:
    assert "the hub has no hf:org/none" in refusal("hf:org/none")
    hub.add("org/model", files())
    assert "has no revision 'v9'" in refusal("hf:org/model@v9")
    hub.add("org/gated", files())
    hub.repos["org/gated"].gated = True
    assert "accept its terms" in refusal("hf:org/gated")


@pytest.mark.parametrize("name", ["", "model", "a/b/c", "../../etc", "org/../x", "org/model@", "org/mod el"])
def test_names_of_nonsense(name: str) -> None:
    assert "is not a repository name" in refusal(f"hf:{name}")


def test_offline_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot reach the hub for hf:org/model" in refusal("hf:org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refusal("hf:org/model")
    assert "hf:org/model" in text
    assert "HF_HOME" in text


def test_published_weights_by_tag_and_by_timms_name(hub: Hub) -> None:
    for tag in ("augreg_in21k_ft_in1k", "augreg_in21k"):
        hub.add(f"timm/vit_tiny_patch16_224.{tag}", {"model.safetensors": files()["model.safetensors"]})
    for source in ("default", "augreg_in21k_ft_in1k", "timm:vit_tiny_patch16_224"):
        loaded = load_source(source, "vit_tiny_patch16_224")
        assert loaded.licence == "apache-2.0"
        assert loaded.architecture.preprocess == PUBLISHED["vit_tiny_patch16_224"][0].preprocess
        assert loaded.architecture.config is not None
        assert loaded.architecture.config.num_classes == 1000
        assert loaded.source.startswith("vit_tiny_patch16_224.augreg_in21k_ft_in1k (hf:timm/")
    other = load_source("timm:vit_tiny_patch16_224.augreg_in21k")
    assert other.architecture.config is not None
    assert other.architecture.config.num_classes == 21843
    hub.add("timm/a_model_unknown_here", files())
    assert load_source("timm:a_model_unknown_here").source.startswith("hf:timm/a_model_unknown_here@")


def test_a_checksum_in_the_catalog_is_asked_of_the_hub_and_held_to(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script fills the table from what the hub states; other weights in the same place are then refused."""
    script = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "weights_checksums.py"))
    table = tmp_path / "published.csv"
    lines = script["TABLE"].read_text().splitlines()
    table.write_text("\n".join(line for line in lines if line.startswith(("model,", "vit_tiny_patch16_224,"))) + "\n")
    name, content = "vit_tiny_patch16_224.augreg_in21k_ft_in1k", files()["model.safetensors"]
    hub.add(f"timm/{name}", {"model.safetensors": content, "config.json": b"{}"})
    told = script["fill"](table)
    digest = hashlib.sha256(content).hexdigest()
    assert told[0] == f"{name}: {digest}"
    assert "RepositoryNotFoundError" in told[1]
    filled = table.read_text().splitlines()
    assert filled[1].split(",")[4] == digest
    assert filled[2] == lines[2]  # and the other row is as it was

    pinned = {"vit_tiny_patch16_224": (replace(PUBLISHED["vit_tiny_patch16_224"][0], sha256=digest),)}
    monkeypatch.setattr("vitrail.pretrained.resolve.PUBLISHED", pinned)
    assert load_source("default", "vit_tiny_patch16_224").source.startswith(f"{name} (hf:timm/")
    other = {key: value + 1 for key, value in load(content).items()}
    hub.add(f"timm/{name}", {"model.safetensors": save(other)}, commit="d" * 40)
    with pytest.raises(WeightsError, match=f"does not match the catalog: .* instead of {digest[:12]}"):
        load_source("default", "vit_tiny_patch16_224")
