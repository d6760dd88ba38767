"""A MODEL of another library: the report of its weights goes to stderr, not to stdout."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from vitrail.cli import main


def test_a_folder_saved_by_timm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    args = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **args)
    config = {"num_classes": 3, "label_names": ["ant", "bee", "cat"], "input_size": [3, 32, 32]}
    timm.models.save_for_hf(model, tmp_path / "theirs", model_config=config, model_args=args)
    Image.new("RGB", (40, 50), "red").save(tmp_path / "red.png")
    with pytest.raises(SystemExit) as left:
        main(["predict", str(tmp_path / "theirs"), str(tmp_path / "red.png"), "--json"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["label"] in {"ant", "bee", "cat"}
    assert err.startswith("weights from")
    assert "20 tensors loaded" in err
