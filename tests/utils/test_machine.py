"""What saves memory or time changes no result, or only its last digits; and it is really on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import tiny
from training.runs import assert_same, outcome, run
from vitrail.errors import ConfigError, DeviceError
from vitrail.models.catalog import Variant
from vitrail.models.configs import SwinConfig
from vitrail.pretrained.create import create_model
from vitrail.training.config.schema import make_config
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.run import train
from vitrail.training.session import Session
from vitrail.training.setup import prepare
from vitrail.utils import device as device_module
from vitrail.utils.device import cpu_threads, describe_precision, uses_bf16


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


SWIN = SwinConfig(img_size=(32, 32), num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4)


def gradients(model: str, **keys: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Of one step of a model, and how often its first block was entered; with drop path on, where there is any."""
    size = 8 if model == tiny.VARIANT.name else 32
    drop = {"drop_path": 0.3} if model != "resnet18" else {}
    setup = prepare(tiny.dataset(), make_config({**tiny.PLAIN, "model": model, "img_size": size, **drop, **keys}))
    session = Session(setup, Reporter(False), torch.device("cpu"))
    trainer, entered = session.trainer, []
    first = next(m for m in trainer.model.modules() if type(m).__name__ in ("Block", "SwinBlock", "BasicBlock"))
    first.register_forward_pre_hook(lambda *_: entered.append(1))
    torch.manual_seed(5)
    seen = trainer.view(next(session.loader.epoch(0)), 0)
    trainer._accumulate_gradients(seen)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    found |= dict(trainer.model.named_buffers())
    return found, entered


@pytest.mark.parametrize("model", [tiny.VARIANT.name, "swin", "resnet18"])
def test_checkpointed_gradients_are_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks drop paths, and where batch norms keep statistics: those must not be updated twice."""
    monkeypatch.setitem(tiny.VARIANTS, "swin", Variant("swin", "swin", SWIN, 0, 0.0))
    plain, once = gradients(model)
    saved, twice = gradients(model, grad_checkpointing=True)
    assert (len(once), len(twice)) == (1, 2), "the backward pass computes the block again"
    assert plain.keys() == saved.keys()
    for name, value in plain.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7, msg=name)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 3
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x.flatten(1))
        return logits


def test_an_external_model_without_checkpointing_is_refused(tmp_path: Path) -> None:
    keys = {key: value for key, value in tiny.PLAIN.items() if key not in ("model", "drop_path")}
    with pytest.raises(ConfigError, match="Plain has no gradient checkpointing: set grad_checkpointing=false"):
        train(
            tiny.dataset(),
            model=Plain(),
            out=tmp_path / "run",
            progress=False,
            **{**keys, "img_size": 8, "in_chans": 1, "grad_checkpointing": True},
        )


@pytest.mark.parametrize("instructions", ["AMX", "AVX512_BF16", None])
def test_auto_uses_bfloat16_for_models_that_are_wide_enough(
    instructions: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"] if instructions else []
    monkeypatch.setattr(device_module, "cpu_bf16", lambda: instructions)
    cpu = torch.device("cpu")
    for name in ("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "vit_nano_patch2_8"):
        with torch.device("meta"):
            model = create_model(name)
        assert [uses_bf16(model, cpu, amp) for amp in ("auto", "bf16", "off")] == [name in wide, True, False]
    assert describe_precision(cpu, True) == f"bfloat16 ({instructions or 'emulated'})"
    assert describe_precision(cpu, False) == "float32"


@pytest.mark.parametrize("instructions", ["AMX", None])
def test_a_resumed_run_keeps_its_precision_on_another_processor(
    instructions: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.test_resume import Killed, kill_at
    from vitrail.training.engine.trainer import Trainer

    monkeypatch.setattr(device_module, "_BF16_MIN_FEATURES", 1)
    monkeypatch.setattr(device_module, "cpu_bf16", lambda: instructions)
    run(tmp_path / "whole", epochs=2, amp="auto")
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 5)
        with pytest.raises(Killed):
            run(tmp_path / "run", epochs=2, amp="auto")
    assert f'amp = "{"bf16" if instructions else "off"}"' in (tmp_path / "run" / "config.toml").read_text()
    monkeypatch.setattr(device_module, "cpu_bf16", lambda: None if instructions else "AMX")
    train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


def test_bfloat16_on_the_cpu_is_on_and_learns() -> None:
    one = tiny.session(epochs=12, amp="bf16", ema=0.5)
    types: set[torch.dtype] = set()
    one.trainer.model.head.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    losses = tiny.learn(one, 12)
    assert types == {torch.bfloat16}
    assert {p.dtype for p in one.trainer.model.parameters()} == {torch.float32}
    assert losses[-1] < 0.5 * losses[0]
    judged = one._evaluate(one.trainer.eval_model, one.validation, "val")
    assert judged.top1 > 90


def test_the_fused_adamw_is_the_plain_one() -> None:
    """And it is the fused one that runs."""
    one = tiny.session(lr=1e-2, weight_decay=0.1)
    assert all(group["fused"] for group in one.trainer.optimizer.param_groups)
    parameters = [p.detach().clone().requires_grad_() for p in one.trainer._parameters]
    groups, taken = [], 0
    for group in one.trainer.optimizer.param_groups:
        count = len(group["params"])
        groups.append({"params": parameters[taken : taken + count], "weight_decay": group["weight_decay"]})
        taken += count
    plain = torch.optim.AdamW(groups, lr=1e-2, foreach=False, fused=False)
    for batch in one.loader.epoch(0):
        one.trainer._accumulate_gradients(one.trainer.view(batch, 0))
        for mine, theirs in zip(parameters, one.trainer._parameters, strict=True):
            mine.grad = theirs.grad.clone()
        for optimizer in (plain, one.trainer.optimizer):
            optimizer.step()
        one.trainer.optimizer.zero_grad(set_to_none=True)
    for mine, theirs in zip(parameters, one.trainer._parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_run_but_for_rounding(tmp_path: Path) -> None:
    """Compiled with this machine's compiler. Without dropout, for which compiled code has numbers of its own; the last
    part of each accumulated batch is smaller than the others."""
    from torch._dynamo.utils import counters

    keys = {"epochs": 1, "accumulate": 3, "drop": 0.0, "drop_path": 0.0}
    plain = run(tmp_path / "plain", **keys)
    counters.clear()
    compiled = run(tmp_path / "compiled", compile=True, **keys)
    assert counters["frames"]["ok"] >= 1
    assert counters["graph_break"] == {}
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("plain", "compiled"))
    for figure in ("train_loss", "val_loss"):
        assert two[figure] == pytest.approx(one[figure], rel=1e-3)
    assert (two["steps"], two["val_top1"]) == (one["steps"], one["val_top1"])


@pytest.mark.slow
def test_without_a_compiler_the_fault_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(DeviceError, match=r"torch.compile .*: set compile=false") as error:
        run(tmp_path / "run", epochs=1, compile=True)
    assert "\n" not in str(error.value)


def test_a_failed_compilation_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def compiled(model: nn.Module) -> Any:
        def forward(images: torch.Tensor) -> Any:
            raise TorchDynamoException("backend='inductor' raised:\nno compiler\n\nand how to go on")

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(DeviceError, match=r"torch.compile .*no compiler.*: set compile=false") as error:
        run(tmp_path / "run", epochs=1, compile=True)
    assert "\n" not in str(error.value)


def test_threads_are_set_for_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), set()
    original = Session.run

    def spy(self: Session) -> None:
        seen.add(torch.get_num_threads())
        original(self)

    monkeypatch.setattr(Session, "run", spy)
    summary = run(tmp_path / "run", epochs=0.2, threads=before + 1).report
    assert seen == {before + 1}
    assert torch.get_num_threads() == before
    assert summary["environment"]["threads"] == before + 1
    run(tmp_path / "other", epochs=0.2)
    assert seen == {before, before + 1}
    with pytest.raises(ZeroDivisionError), cpu_threads(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_another_number_of_threads_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.test_resume import Killed, kill_at
    from vitrail.training.engine.trainer import Trainer

    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 5)
        with pytest.raises(Killed):
            run(tmp_path / "run", threads=1)
    with pytest.raises(ConfigError, match="threads=1"):
        train(tiny.dataset(), resume=tmp_path / "run", threads=2, progress=False)
    assert math.isfinite(train(tiny.dataset(), resume=tmp_path / "run", progress=False).report["loss"])
