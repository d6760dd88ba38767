"""Where weights come from is told by looking, and everything known travels along."""

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vitrail.errors import ModelError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.catalog import VARIANTS
from vitrail.models.configs import ViTConfig
from vitrail.pretrained.local import licence_of, read_architecture
from vitrail.pretrained.resolve import load_source
from weights.checkpoints import all_cases, images, transformers_models, worst


def refusal(source: str | Path, model: str | None = None) -> str:
    with pytest.raises((WeightsError, ModelError)) as error:
        load_source(source, model)
    assert str(error.value).isprintable()
    return str(error.value)


def content(case: str = "timm vit") -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in all_cases()[case].content.items()}


# ---- files and folders


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".ckpt"])
def test_a_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(content(), path) if suffix == ".safetensors" else torch.save({"model": content()}, path)
    loaded = load_source(str(path))
    assert (loaded.layout, loaded.num_classes, loaded.source) == ("timm ViT", 5, str(path))
    assert loaded.architecture.config is None


@torch.inference_mode()
def test_googles_npz(tmp_path: Path) -> None:
    case = all_cases()["google npz"]
    np.savez(tmp_path / "w.npz", **{key: value.numpy() for key, value in case.content.items()})
    model = case.model()
    report = load_source(tmp_path / "w.npz").fit(model)
    assert worst(model(images()), case.reference(images())) <= 1e-5
    assert report.layout == "Google ViT"


def timm_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    whole = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": args, **config}
    (folder / "config.json").write_text(json.dumps(whole))
    save_file(content(), folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("inside", ["", "model.safetensors"])
def test_timms_folder(tmp_path: Path, inside: str) -> None:
    cfg = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "crop_pct": 0.8,
    }
    names = ["a", "b", "c", "d", "e"]
    loaded = load_source(timm_folder(tmp_path / "m", pretrained_cfg=cfg, label_names=names) / inside)
    known = loaded.architecture
    assert known.preprocess == Preprocess(
        size=(32, 32), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear", crop_pct=0.8
    )
    assert (known.name, known.class_names) == ("vit_tiny_patch16_224", tuple(names))
    assert isinstance(known.config, ViTConfig)
    assert loaded.fit(build_model(known.config)).of("loaded")


def test_a_grid_that_is_not_square_is_known_from_the_config(tmp_path: Path) -> None:
    config = all_cases()["timm vit"].config
    long = build_model(type(config)(**{**vars(config), "img_size": (16, 64)}))
    folder = timm_folder(tmp_path / "m")
    table = json.loads((folder / "config.json").read_text())
    table["model_args"]["img_size"] = [16, 64]
    (folder / "config.json").write_text(json.dumps(table))
    save_file(long.state_dict(), folder / "model.safetensors")
    square = build_model(config)
    assert "from a grid of 2x8 to 4x4" in str(load_source(folder).fit(square))


def test_our_folders_and_runs(tmp_path: Path) -> None:
    from vitrail.pretrained.model_folder import Contents, write_model_folder

    model = all_cases()["timm vit"].model()
    preprocess = Preprocess(size=(32, 32), crop_pct=0.7)
    contents = Contents(
        model=model, preprocess=preprocess, class_names=tuple("abcde"), architecture="vit_tiny_patch16_224", notes={}
    )
    write_model_folder(tmp_path / "run" / "model", contents)
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded = load_source(path)
        assert loaded.architecture.config == model.config
        assert loaded.architecture.preprocess == preprocess
        assert loaded.architecture.class_names == tuple("abcde")


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "deit with teacher", "swin", "dinov2 with registers"])
def test_transformers_folder(tmp_path: Path, name: str) -> None:
    model = transformers_models()[name]
    model.save_pretrained(tmp_path)
    loaded = load_source(tmp_path)
    config = loaded.architecture.config
    assert config is not None
    if "dinov2" not in name:
        assert loaded.architecture.class_names == tuple(f"class {i}" for i in range(5))
    ours = build_model(type(config)(**{**vars(config), "num_classes": loaded.num_classes})).eval()
    loaded.fit(ours)
    out = model(images())
    expected = out.last_hidden_state[:, 0] if "dinov2" in name else out.logits
    assert worst(ours(images()), expected) <= 1e-5


PROCESSORS = [
    (
        {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2},
        Preprocess(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_mode="squash"),
    ),
    (
        {
            "size": {"shortest_edge": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
        },
        Preprocess(size=(224, 224), crop_pct=224 / 256),
    ),
    (
        {
            "size": 256,
            "do_center_crop": True,
            "crop_size": 224,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,
        },
        Preprocess(size=(224, 224), mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=224 / 256, crop_mode="squash"),
    ),
    ({"do_resize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, None),
    ({"size": 224, "rescale_factor": 1.0, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, None),
]


@pytest.mark.parametrize(("processor", "expected"), PROCESSORS)
def test_transformers_processors(tmp_path: Path, processor: Any, expected: Preprocess | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert read_architecture(tmp_path).preprocess == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "vit", "hidden_act": "relu"}, "activation 'relu'"),
        ({"model_type": "dinov2", "use_swiglu_ffn": True}, "SwiGLU"),
        ({"model_type": "swin", "use_absolute_embeddings": True}, "absolute position"),
        ({"model_type": "bert"}, "'bert'"),
        ({"model_type": "vit", "hidden_size": "wide"}, "is invalid"),
        ({"model_type": "vit", "hidden_size": 0}, "is invalid"),
        ({"model_type": "swin", "depths": 7}, "is invalid"),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"act_layer": "relu"}},
            "act_layer=relu",
        ),
        ({"architecture": "vit_tiny_patch16_224", "model_args": [1]}, "is invalid"),
        ({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"input_size": 3}}, "is invalid"),
        ({"architecture": "vit_tiny_patch16_224", "num_classes": -3}, "is invalid"),
        ({"vitrail": {"family": "vit"}}, ""),
        ({"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 10**9}, "a different model from the weights"),
        ({"model_type": "vit", "hidden_size": 12 * 10**6}, "a different model from the weights"),
        ({"model_type": "vit", "hidden_size": 24, "intermediate_size": 96, "image_size": 10**6}, "more than 32,768"),
        ({"model_type": "vit", "hidden_size": 24, "num_hidden_layers": "2"}, "depth cannot be '2'"),
        ({"model_type": "vit", "hidden_size": 24, "num_hidden_layers": [2]}, "depth cannot be [2]"),
        (
            {"architecture": "resnet18", "model_args": {"layers": [10**9, 2, 2, 2]}},
            "a different model from the weights",
        ),
        ({"architecture": "swin_tiny_patch4_window7_224", "model_args": {"window_size": 10**6}}, "a different model"),
    ],
)
def test_a_config_of_nonsense(tmp_path: Path, config: Any, words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(content(), tmp_path / "model.safetensors")
    assert words in refusal(tmp_path)


def test_a_licence_is_read_from_the_card(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: 'cc-by-nc-4.0'\ntags: []\n---\n")
    assert licence_of(tmp_path) == "cc-by-nc-4.0"
    (tmp_path / "README.md").write_text("license: mit\n")
    assert licence_of(tmp_path) is None


# ---- words


def test_unknown_words() -> None:
    assert "did you mean 'augreg_in21k_ft_in1k'" in refusal("augreg_in21k_ft_in1", "vit_tiny_patch16_224")
    assert "give a file, a folder, hf:org/repo or a URL" in refusal("nothing")
    assert "no published weights for vit_nano" in refusal("default", "vit_nano_patch2_8")
    assert "folder/none.pth does not exist" in refusal("folder/none.pth")
    assert "none.safetensors does not exist" in refusal("none.safetensors")
    assert "torchvision:vit_b_17 is not known (did you mean 'vit_b_16'" in refusal("torchvision:vit_b_17")
    assert "has no weights 'V9': choose from torchvision_v1, torchvision_v2" in refusal("torchvision:resnet50.V9")


def test_a_folder_with_several_checkpoints(tmp_path: Path) -> None:
    for name in ("a.pth", "b.pth"):
        torch.save(content(), tmp_path / name)
    assert "(a.pth, b.pth)" in refusal(tmp_path)
    (tmp_path / "a.pth").unlink()
    assert load_source(tmp_path).num_classes == 5
    (tmp_path / "b.pth").unlink()
    assert "no weights" in refusal(tmp_path)


# ---- URLs


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_url_with_its_checksum(web: tuple[str, Path]) -> None:
    url, folder = web
    torch.save(content(), folder / "w.pth")
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    loaded = load_source(f"{url}/w.pth#sha256={digest}")
    assert loaded.source == f"{url}/w.pth"
    (folder / "w.pth").unlink()
    assert load_source(f"{url}/w.pth#sha256={digest}").num_classes == 5, "from the cache"
    assert "404" in refusal(f"{url}/none.pth#sha256={digest}")


def test_a_url_without_or_with_a_wrong_checksum(web: tuple[str, Path]) -> None:
    url, folder = web
    torch.save(content(), folder / "w.pth")
    for fragment in ("", "#", "#sha256=", "#sha256=xyz", "#md5=0123456789abcdef"):
        assert "needs a checksum" in refusal(f"{url}/w.pth{fragment}")
    assert "checksum" in refusal(f"{url}/w.pth#sha256={'0' * 64}")
    assert "too few digits" in refusal(f"{url}/w.pth#sha256=00000000")


def test_a_url_cannot_choose_its_place(web: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = web
    torch.save(content(), folder / "w.pth")
    refusal(f"{url}/..%2f..%2f..%2fevil.pth#sha256={'0' * 64}")
    assert not list(tmp_path.rglob("evil.pth"))


def test_the_beginning_of_a_checksum(web: tuple[str, Path]) -> None:
    url, folder = web
    torch.save(content(), folder / "w.pth")
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    assert load_source(f"{url}/w.pth#sha256={digest[:16]}").num_classes == 5


def test_torchvisions_names_lead_to_its_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    from vitrail.pretrained import resolve as sources

    asked = []

    def fetch(url: str, path: Path, sha256: str, **_: Any) -> Path:
        asked.append((url.rpartition("/")[2], sha256))
        raise WeightsError("far enough")

    monkeypatch.setattr(sources, "fetch", fetch)
    for name in ("resnet50", "resnet50.IMAGENET1K_V1", "vit_b_16", "vit_b_16.IMAGENET1K_SWAG_E2E_V1", "swin_t.DEFAULT"):
        refusal(f"torchvision:{name}")
    refusal("torchvision_swag_linear", "vit_large_patch16_224")
    assert asked == [
        ("resnet50-11ad3fa6.pth", "11ad3fa6"),
        ("resnet50-0676ba61.pth", "0676ba61"),
        ("vit_b_16-c867db91.pth", "c867db91"),
        ("vit_b_16_swag-9ac1b537.pth", "9ac1b537"),
        ("swin_t-704ceda3.pth", "704ceda3"),
        ("vit_l_16_lc_swag-4d563306.pth", "4d563306"),
    ]


def test_every_published_config_is_a_config() -> None:
    from vitrail.pretrained.foreign_configs import from_record

    for name, variant in VARIANTS.items():
        for record in variant.weights:
            known = from_record(record)
            assert known.name == name
            assert known.config is not None
            assert known.config.img_size == record.preprocess.size
