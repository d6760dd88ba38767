"""SGD, LAMB and Muon: the steps of torch's and timm's, in runs that resume bit for bit, and on several processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn

from tolerance import assert_near
from training import tiny
from training.runs import assert_same, outcome, run
from training.test_distributed import SAME, assert_close, launch, trained
from vitrail.errors import ConfigError
from vitrail.models.build import build_model
from vitrail.models.configs import ConvNeXtConfig, ResNetConfig, SwinConfig, ViTConfig
from vitrail.training.config.recipes import Recipe, check_optimizer, named_recipe, rates_for
from vitrail.training.config.schema import make_config
from vitrail.training.engine.optimizer import make_optimizer, parameter_groups
from vitrail.training.engine.optimizers.muon import orthogonalize
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train

VIT = ViTConfig(img_size=(32, 32), embed_dim=32, depth=3, num_heads=2, num_classes=5)
SWIN = SwinConfig(
    img_size=(32, 32), patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2), window_size=4, num_classes=5
)
CONVNEXT = ConvNeXtConfig(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=5)
OTHERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-3},
    "lamb": {"optimizer": "lamb", "lr": 0.01, "weight_decay": 0.02},
    "muon": {"optimizer": "muon", "lr": 0.01, "weight_decay": 0.1},
}


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5) -> dict[str, torch.Tensor]:
    """The parameters after steps on gradients that are the same for every model of one shape."""
    for step in range(count):
        torch.manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 10.0 ** -(step % 3)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def pair(**keys: Any) -> tuple[dict[str, torch.Tensor], nn.Module, list[dict[str, Any]]]:
    """What our optimizer makes of a ViT, the same ViT before it, and its groups."""
    torch.manual_seed(0)
    ours, theirs = build_model(VIT), build_model(VIT)
    theirs.load_state_dict(ours.state_dict())
    config = make_config(keys)
    optimizer = make_optimizer(parameter_groups(ours, config), config.optimizer)
    return steps(ours, optimizer), theirs, parameter_groups(theirs, config)


def test_sgd_is_torchs() -> None:
    found, model, groups = pair(**OTHERS["sgd"], momentum=0.8)
    expected = steps(model, torch.optim.SGD(groups, momentum=0.8, nesterov=True))
    for name, value in expected.items():
        assert_near(found[name], value, name=name)


def test_lamb_is_timms() -> None:
    found, model, groups = pair(**OTHERS["lamb"], betas=(0.8, 0.95))
    expected = steps(model, timm.optim.Lamb(groups, betas=(0.8, 0.95), max_grad_norm=None))
    for name, value in expected.items():
        assert_near(found[name], value, name=name)


def in_float32(*args: Any, **keys: Any) -> torch.Tensor:
    """timm's iteration, which is in bfloat16 by default."""
    return zeropower_via_newtonschulz(*args, **{**keys, "dtype": torch.float32})


def test_muon_is_timms_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    """torch.optim.Muon computes in bfloat16, so that timm's, in float32, is the closer one."""
    found, model, groups = pair(**OTHERS["muon"], betas=(0.8, 0.95))
    hidden, rest = ([g for g in groups if g["orthogonalize"] == kind] for kind in (True, False))
    expected = steps(model, torch.optim.AdamW(rest, betas=(0.8, 0.95)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.optim.muon.zeropower_via_newtonschulz", in_float32)
        options = {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": "original"}
        muon = timm.optim.Muon(hidden, momentum=0.95, nesterov=True, **options)
        expected |= steps(model, muon)
    for name, value in expected.items():
        assert_near(found[name], value, name=name)


def test_muon_is_torchs_within_bfloat16() -> None:
    found, model, groups = pair(**OTHERS["muon"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = [parameter for group in groups if group["orthogonalize"] for parameter in group["params"]]
    theirs = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    expected, start = steps(model, theirs), build_model(VIT).state_dict()
    assert {names[id(parameter)] for parameter in matrices} == {
        f"blocks.{block}.{part}.weight"
        for block in range(3)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    for parameter in matrices:
        name = names[id(parameter)]
        # The iteration is chaotic in the least singular values: the whole update is compared, not each number.
        assert (found[name] - expected[name]).norm() < 0.05 * 0.01 * 5 * 0.2 * max(parameter.shape) ** 0.5 * min(
            parameter.shape
        ) ** 0.5, name
        assert start[name].shape == parameter.shape


@pytest.mark.parametrize("shape", [(1, 24, 24), (3, 8, 40), (2, 40, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    draws = torch.randn(shape)
    found = orthogonalize(draws)
    sizes = torch.linalg.svdvals(found)
    if shape[1] != shape[2]:  # a square one has singular values near 0
        assert sizes.min() > 0.6
    assert sizes.max() < 1.3
    u, _, vh = torch.linalg.svd(draws, full_matrices=False)
    polar = u @ vh
    assert float((found * polar).sum() / (found.norm() * polar.norm())) > 0.95
    assert not orthogonalize(torch.zeros(shape)).any()


def test_what_muon_takes_of_other_networks() -> None:
    """Linear layers of blocks, neither heads nor tables nor kernels of convolutions; a ResNet has none."""
    config = make_config({"optimizer": "muon"})
    for kind in (SWIN, CONVNEXT):
        model = build_model(kind)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = [
            (names[id(p)], p.ndim) for g in parameter_groups(model, config) if g["orthogonalize"] for p in g["params"]
        ]
        assert found
        for name, dims in found:
            assert dims == 2
            assert any(part in name for part in ("attn.qkv", "attn.proj", "mlp.fc", "downsample.reduction")), name
    with pytest.raises(ConfigError, match="optimizer=adamw"):
        parameter_groups(build_model(ResNetConfig(block="basic", layers=(1, 1, 1, 1), num_classes=5)), config)


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    """As it is told on a GPU: by a tensor."""
    model, config = build_model(VIT), make_config(OTHERS[name])
    optimizer: Any = make_optimizer(parameter_groups(model, config), config.optimizer)
    steps(model, optimizer, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    after = [value for entry in optimizer.state.values() for value in entry.values()]
    assert all(torch.equal(one, two) for one, two in zip(state, after, strict=True))
    optimizer.found_inf = torch.zeros(())
    steps(model, optimizer, 1)
    assert not torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize("name", OTHERS)
def test_a_killed_run_goes_on_bit_for_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With layer decay, clipping and an average of weights."""
    keys = {**OTHERS[name], "layer_decay": 0.8}
    run(tmp_path / "whole", **keys)
    original = Trainer.step

    def step(self: Trainer, batch: Any) -> None:
        if self.state.steps == 8:
            raise KeyboardInterrupt
        original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", **keys)
    train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_two_processes_learn_what_one_learns_and_resume(name: str, shard: bool, tmp_path: Path) -> None:
    keys = {**SAME, **OTHERS[name], "shard": shard, "checkpoint_every": 3}
    whole = trained(2, tmp_path / "two", out=tmp_path / "two", **keys)
    assert_close(trained(1, tmp_path / "one", out=tmp_path / "one", **keys), whole)
    assert launch(2, out=tmp_path / "run", end=[5, signal.SIGKILL, 1], **keys).returncode != 0
    assert_same(trained(2, tmp_path / "run", resume=tmp_path / "run"), whole)


def test_rates_of_adamw_are_not_taken_for_another_optimizer() -> None:
    with pytest.raises(ConfigError, match="sgd needs lr and weight_decay"):
        check_optimizer({"optimizer": "sgd"}, None)
    with pytest.raises(ConfigError, match="lamb needs lr"):
        check_optimizer({"optimizer": "lamb"}, Recipe("deit", {"lr": 1e-3}))
    with pytest.raises(ConfigError, match="momentum"):
        tiny.session(momentum=0.9)
    with pytest.raises(ConfigError, match="adamw needs lr"):
        check_optimizer({"optimizer": "adamw"}, named_recipe("tiny-vit"))
    check_optimizer({"optimizer": "adamw"}, named_recipe("tiny"))
    check_optimizer({}, named_recipe("tiny-vit"))
    check_optimizer({"optimizer": "muon"}, Recipe("deit", {"lr": 1e-3}))
    check_optimizer({"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0}, None)
    check_optimizer({}, Recipe("mine", {"optimizer": "lamb", "lr": 5e-3}))
    assert rates_for(64, {"batch_size": 256, "lr": 0.1, "optimizer": "sgd"}) == {"lr": 0.025}
    assert rates_for(64, {"batch_size": 256, "lr": 0.1, "optimizer": "lamb"}) == {"lr": 0.05}


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitrail", "train", "digits", "optimizer=lamb", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "lr=5e-3" in done.stderr
