"""Steps that are tried out leave no trace, and the memory foreseen is the memory taken."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from vitrail.pretrained.create import create_model
from vitrail.training import run as run_module
from vitrail.training.engine.trainer import Trainer
from vitrail.training.resources import forecast as cost
from vitrail.training.resources import trial
from vitrail.training.resources.trial import blank_batch, estimate_peak_memory, fits_in_memory, preserve_state
from vitrail.training.session import Session


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


def everything(session: Session) -> dict[str, Any]:
    """All that the next step depends on."""
    trainer = session.trainer
    return {
        "state": {
            f"{part} {name}": value.clone()
            for part, tensors in trainer.state_dict().items()
            for name, value in tensors.items()
        },
        "place": vars(trainer.state).copy(),
        "rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "random": torch.get_rng_state().tolist(),
        "gradients": [p.grad for p in trainer.model.parameters()],
        "mode": trainer.model.training,
    }


def test_a_trial_leaves_everything_as_it_was() -> None:
    """Weights, averages, batch norm, dropout's generator, the place and the rates, also where it fails in its midst."""
    session = tiny.session(**{key: KEYS[key] for key in ("ema", "drop_path", "drop", "mixup", "erase")})
    before = everything(session)

    def fail() -> None:
        for batch in session.loader.epoch(0):
            session.trainer.step(batch)
        session.trainer.task(session.trainer.model, session.trainer.view(batch, 0)).backward()
        assert everything(session)["place"] != before["place"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), preserve_state(session.trainer):
        fail()
    after = everything(session)
    assert tiny.same(after.pop("state"), before.pop("state"))
    assert after == before
    assert not session.trainer.optimizer.state


def test_a_run_that_was_estimated_is_the_run_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in weights, averages and metrics."""
    steps = []
    original = Trainer.step

    def step(self: Trainer, batch: Any, *others: Any) -> None:
        steps.append(len(batch))
        original(self, batch, *others)

    monkeypatch.setattr(Trainer, "step", step)
    run(tmp_path / "plain")
    assert len(steps) == 12, "a run of twelve steps is too short to be estimated"
    monkeypatch.setattr(cost, "_MAX_SHARE", 0.5)
    run(tmp_path / "estimated")
    assert len(steps) == 12 + 12 + cost._MAX_STEPS
    assert_same(outcome(tmp_path / "plain"), outcome(tmp_path / "estimated"))


def test_a_step_without_memory_does_not_fit_and_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.session()
    batch = blank_batch(4, session.setup.preprocess)
    assert fits_in_memory(session.trainer, batch)
    task = session.trainer.task

    def hungry(model: Any, view: Any) -> torch.Tensor:
        task(model, view).backward()
        return torch.empty(2**60)

    session.trainer.task = hungry
    assert not fits_in_memory(session.trainer, batch)
    assert all(p.grad is None for p in session.trainer.model.parameters())

    def wrong(model: Any, view: Any) -> torch.Tensor:
        raise RuntimeError("something else")

    session.trainer.task = wrong
    with pytest.raises(RuntimeError, match="something else"):
        fits_in_memory(session.trainer, batch)


def test_kept_tensors_counted_by_hand() -> None:
    """Two linear layers: the backward pass needs the input of each, the ReLU its result, the loss log-softmax's."""
    session = tiny.session()

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(64, 100), torch.nn.Linear(100, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.two(self.one(x.flatten(1)).relu())
            return out

    session.trainer.model = Two()
    few, more = (trial._saved_bytes(session.trainer, session.setup.preprocess, size) for size in (2, 4))
    an_image = 4 * (64 + 100 + 3) + 8  # float32, and the label as int64
    assert more - few == 2 * an_image


def test_the_memory_foreseen_grows_with_the_part_that_is_learnt_at_once() -> None:
    whole, parts = tiny.session(), tiny.session(accumulate=4)
    held = estimate_peak_memory(whole.trainer, whole.setup.preprocess, 1)
    kept = [estimate_peak_memory(one.trainer, one.setup.preprocess, 40_000) - held for one in (whole, parts)]
    assert kept[0] == pytest.approx(4 * kept[1], rel=0.2)
    assert kept[0] > 40_000 * 8 * 8 * 4


@pytest.mark.slow
def test_the_memory_foreseen_is_the_memory_taken(tmp_path: Path) -> None:
    """A ViT-Ti on 64 images of 128 px in a process of its own: the system's peak is within a fifth of what was told."""
    import subprocess
    import sys

    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch; torch.set_num_threads(1)
from vitrail.utils.memory import peak_memory
from vitrail.training.setup import prepare
from vitrail.training.monitoring.progress import Reporter
from vitrail.training.session import Session
from vitrail.training.resources.trial import blank_batch, estimate_peak_memory
from vitrail.training.config.schema import make_config
keys = dict(model="vit_tiny_patch16_224", img_size=128, batch_size=64, workers=0)
session = Session(prepare("digits", make_config(keys)), Reporter(False), torch.device("cpu"))
foreseen = estimate_peak_memory(session.trainer, session.setup.preprocess, 64)
session.trainer.step(blank_batch(64, session.setup.preprocess))
print(foreseen, peak_memory(torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    foreseen, taken = map(int, done.stdout.split())
    assert foreseen == pytest.approx(taken, rel=0.2)


def test_no_trial_for_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.test_resume import Killed, kill_at
    from vitrail.training.run import train

    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 5)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    asked: list[Session] = []
    monkeypatch.setattr(run_module, "_log_cost", lambda session, reporter: asked.append(session))
    train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert asked == []
    run(tmp_path / "other", epochs=1)
    assert len(asked) == 1


def test_checkpointed_blocks_are_foreseen_to_need_less() -> None:
    kept = []
    for checkpointing in (False, True):
        model = create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, in_chans=1)
        model.set_grad_checkpointing(checkpointing)
        session = tiny.session(img_size=32)
        session.trainer.model = model.train()
        kept.append(trial._saved_bytes(session.trainer, session.setup.preprocess, 8))
    assert kept[1] < 0.3 * kept[0]


def test_an_estimate_frees_the_tensors_that_it_counts() -> None:
    """A graph whose saved tensors are kept with that graph is a cycle that Python's collector does not see."""
    session = tiny.session()

    def alive() -> int:
        gc.collect()
        return sum(type(each) is torch.Tensor for each in gc.get_objects())

    estimate_peak_memory(session.trainer, session.setup.preprocess, 8)  # what is made once
    before = alive()
    estimate_peak_memory(session.trainer, session.setup.preprocess, 8)
    assert alive() == before


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("could not create a primitive"), RuntimeError("std::bad_alloc"), OSError(12, "")],
    ids=["python", "oneDNN", "C++", "system"],
)
def test_no_memory_for_anything_in_a_step_means_that_it_does_not_fit(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = tiny.session()

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(session.trainer, "task", fail)
    with preserve_state(session.trainer):
        assert not fits_in_memory(session.trainer, blank_batch(2, session.setup.preprocess))
    error = RuntimeError("could not create a primitive descriptor for the matmul primitive. Run workload with ...")
    with pytest.raises(RuntimeError, match="descriptor"), preserve_state(session.trainer):
        fits_in_memory(session.trainer, blank_batch(2, session.setup.preprocess))


def test_trials_are_of_half_a_batch_where_a_whole_one_takes_much() -> None:
    limit, trainer = trial._TRIAL_BYTES, tiny.session().trainer
    assert [trial.trial_images(trainer, expected, 64) for expected in (limit, limit + 1)] == [64, 32]
    assert [trial.trial_images(trainer, limit + 1, images) for images in (15, 16)] == [15, 8]
    trainer.device = torch.device("meta")
    assert trial.trial_images(trainer, limit + 1, 64) == 64
    trainer.device = torch.device("cpu")
    machine = trainer.config.machine.model_copy(update={"compile": True})
    trainer.config = trainer.config.model_copy(update={"machine": machine})
    assert trial.trial_images(trainer, limit + 1, 64) == 64, "another size would be compiled again"
