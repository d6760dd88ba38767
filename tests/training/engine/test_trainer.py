"""The step, against a loop written out in plain torch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tolerance import assert_near
from training import tiny
from vitrail.images import limits
from vitrail.models.build import build_model
from vitrail.training.engine.interrupt import Interrupt
from vitrail.training.engine.optimizer import set_rates
from vitrail.utils.counter_rng import fold


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def plain_loop(one: Any, lr: float, clip: float, smoothing: float) -> dict[str, torch.Tensor]:
    """Ten steps as anybody would write them: AdamW, cosine, clipping; the same batches and the same seeds."""
    data = one.setup.dataset.split("train")
    torch.manual_seed(fold(0, "weights"))
    model = build_model(tiny.CONFIG).train()
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in ("cls_token", "pos_embed")]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or n in ("cls_token", "pos_embed")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=lr, foreach=False
    )
    step = 0
    for epoch in range(2):
        for batch in one.loader.epoch(epoch):
            rows = batch.indices.numpy()
            images = (torch.from_numpy(data.images[rows])[:, None].float() / 255 - 0.4) / 0.3
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / 10)) / 2
            torch.manual_seed(fold(0, "step", step))
            logits = model(images)
            loss = F.cross_entropy(logits, torch.from_numpy(data.labels[rows]), label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            step += 1
    assert step == 10
    return model.state_dict()


def test_equals_a_plain_loop() -> None:
    keys = {"epochs": 2, "lr": 3e-3, "clip_grad": 0.5, "label_smoothing": 0.1, "weight_decay": 0.1, "drop_path": 0.1}
    expected = plain_loop(tiny.session(**keys), 3e-3, 0.5, 0.1)
    found = tiny.trained(**keys)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_it_learns() -> None:
    one = tiny.session(epochs=12, ema=0.5)
    losses = tiny.learn(one, 12)
    assert losses[-1] < 0.5 * losses[0]
    assert one._validate(one.validation, Interrupt())["val_top1"] == 100.0


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """Also where parts differ in size and targets are shares. In eval mode: batch norm would see the parts."""
    gradients = {}
    for parts in (1, 3):
        one = tiny.session(accumulate=parts, mixup=0.5, drop_path=0.0)
        trainer = one.trainer
        trainer.model.eval()
        batch = next(one.loader.epoch(0))
        loss = trainer._accumulate_gradients(trainer.view(batch, 0))
        gradients[parts] = {name: p.grad for name, p in trainer.model.named_parameters()}
        gradients[parts]["loss"] = loss
    for name, value in gradients[1].items():
        assert_near(gradients[3][name], value, name=name)


def test_a_step_draws_from_its_own_number_alone() -> None:
    """Whatever was drawn before, the step is the same; and its neighbour differs."""
    results = []
    for noise in (0, 7):
        one = tiny.session(drop_path=0.5)
        torch.rand(noise)
        one.trainer.step(next(one.loader.epoch(0)))
        results.append(one.trainer.state_dict()["model"])
    assert tiny.same(*results)
    one = tiny.session(drop_path=0.5)
    one.trainer.state.steps = 1
    set_rates(one.trainer.optimizer, 1.0)
    one.trainer.step(next(one.loader.epoch(0)))
    assert not tiny.same(results[0], one.trainer.state_dict()["model"])


def test_with_little_memory_a_step_is_made_while_no_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_memory_is_scarce", lambda look: True)
    one, free = tiny.session(), list[int]()
    task = one.trainer.task

    def checked(model: Any, view: Any) -> torch.Tensor:
        free.append(limits._memory._free)
        loss: torch.Tensor = task(model, view)
        return loss

    monkeypatch.setattr(one.trainer, "task", checked)
    tiny.learn(one, 2)
    assert set(free) == {0}
    assert limits._memory._free == limits.DECODING_BYTES


def test_rates_follow_the_schedule() -> None:
    one = tiny.session(lr=1e-2, head_lr=1e-1, warmup_epochs=0.4)
    seen = []
    for batch in one.loader.epoch(0):
        one.trainer.step(batch)
        seen.append({group["lr"] for group in one.trainer.optimizer.param_groups})
    factors = [1 / 3, 2 / 3, 1.0, 0.75, 0.25]
    for rates, factor in zip(seen, factors, strict=True):
        assert sorted(rates) == pytest.approx([1e-2 * factor, 1e-1 * factor])
