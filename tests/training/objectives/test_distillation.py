"""Distillation: the losses against hand-derived numbers, torch's and timm's; runs with a teacher; stored outputs."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch import Tensor, nn

from tolerance import assert_near
from training import tiny
from training.runs import KEYS, assert_same, outcome, run
from training.test_resume import Killed, kill_at
from vitrail.classifier import Classifier
from vitrail.data.dataset import FileSplit
from vitrail.errors import ConfigError, ModelError, RunError, VitrailError, WeightsError
from vitrail.images.preprocess import Preprocess
from vitrail.models.build import build_model
from vitrail.models.configs import ResNetConfig
from vitrail.training.config.schema import make_config
from vitrail.training.engine.batch_augmenter import View
from vitrail.training.engine.trainer import Trainer
from vitrail.training.objectives.classification import Classify
from vitrail.training.objectives.distillation import Distill, Hard, Soft
from vitrail.training.objectives.teacher import TeacherLogits
from vitrail.training.objectives.teacher_cache import StoredLogits, _images
from vitrail.training.run import train

PREPROCESS = Preprocess(size=(8, 8), mean=(0.5,), std=(0.25,), channels=1)
NAMES = ("three", "one", "two")  # not in the data's order


@pytest.fixture(autouse=True)
def _variant(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.add_variant(monkeypatch)


@pytest.fixture
def token_student(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny.CONFIG, dist_token=True)
    monkeypatch.setitem(tiny.VARIANTS, tiny.VARIANT.name, replace(tiny.VARIANT, config=config))


def a_teacher(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    config = ResNetConfig(
        block="basic", layers=(1, 1), channels=(4, 8), small_stem=True, num_classes=3, in_chans=1, img_size=(8, 8)
    )
    return Classifier(build_model(config), PREPROCESS, NAMES, architecture="resnet20_32")


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return a_teacher().save(tmp_path / "teacher")


# ---- losses

LOGITS = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
TAUGHT = torch.tensor([[0.0, 1.0, 0.0], [0.0, 3.0, 1.0]])
LABELS = torch.tensor([0, 2])


def view(images: Tensor, labels: Tensor = LABELS) -> View:
    return View(images, labels, torch.arange(len(labels)), 0)


class Student(nn.Module):
    """Gives its images' numbers; with a token, of the second head half of them."""

    def __init__(self, token: bool) -> None:
        super().__init__()
        self.token = token

    def forward(self, x: Tensor) -> Any:
        return (x, x / 2) if self.token else x


def test_hard_is_derived_by_hand() -> None:
    # -log softmax at the teacher's classes 1 and 1: log(1 + e + 1/e) and log(2 + e^2) - 2.
    e = torch.e
    expected = (torch.log(torch.tensor(1 + e + 1 / e)) + torch.log(torch.tensor(2 + e**2)) - 2) / 2
    torch.testing.assert_close(Hard()(LOGITS, TAUGHT), expected)


def test_soft_is_derived_by_hand() -> None:
    """tau^2 sum t (log t - log s), t and s written out."""
    tau, total = 2.0, 0.0
    for student, teacher in zip(LOGITS.tolist(), TAUGHT.tolist(), strict=True):
        s = [torch.e ** (x / tau) for x in student]
        t = [torch.e ** (x / tau) for x in teacher]
        s, t = [x / sum(s) for x in s], [x / sum(t) for x in t]
        total += sum(
            b * (torch.log(torch.tensor(b)).item() - torch.log(torch.tensor(a)).item())
            for a, b in zip(s, t, strict=True)
        )
    assert Soft(tau)(LOGITS, TAUGHT).item() == pytest.approx(tau**2 * total / 2, rel=1e-5)


def test_soft_is_torchs() -> None:
    student, teacher = torch.randn(7, 5), torch.randn(7, 5)
    for tau in (1.0, 3.0):
        loss = nn.KLDivLoss(reduction="batchmean")
        expected = tau**2 * loss((student / tau).log_softmax(1), (teacher / tau).softmax(1))
        torch.testing.assert_close(Soft(tau)(student, teacher), expected)


def test_the_gradients_size_does_not_go_with_the_temperature() -> None:
    """Hinton et al., section 2: of logits that are small against it, tau^2 KL has a gradient of (s - t) / K."""
    student, teacher = 1e-2 * torch.randn(4, 5, dtype=torch.double), 1e-2 * torch.randn(4, 5, dtype=torch.double)
    student, teacher = (x - x.mean(1, keepdim=True) for x in (student, teacher))
    for tau in (1.0, 10.0):
        x = student.clone().requires_grad_()
        Soft(tau)(x.double(), teacher).backward()
        torch.testing.assert_close(x.grad, ((student - teacher) / 5 / 4).float().double(), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("scheme", [Hard(), Soft(3.0)])
def test_the_whole_is_a_weighted_sum(scheme: Hard | Soft, token: bool) -> None:
    """DeiT's equations 2 and 3 with lambda = 0.3; without a token both parts are of the same logits."""
    task = Distill(Classify(0.1), lambda _: TAUGHT, scheme, 0.3)
    follower = LOGITS / 2 if token else LOGITS
    expected = 0.7 * F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1) + 0.3 * scheme(follower, TAUGHT)
    torch.testing.assert_close(task(Student(token), view(LOGITS)), expected)


class ForTimm(nn.Module):
    """What timm's tasks ask of a student and a teacher."""

    num_classes, in_chans, pretrained_cfg = 3, 1, {"mean": (0.0,), "std": (1.0,)}

    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = forward

    def set_distilled_training(self, enable: bool) -> None:
        pass

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(("kind", "token"), [("hard", True), ("soft", True), ("soft", False)])
def test_losses_are_timms(kind: str, token: bool) -> None:
    images = torch.randn(6, 1, 1, 3)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    student, taught = Student(token), lambda x: x.flatten(1).cos()
    options: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
        "task_loss_weight": 0.6,
        "temperature": 2.0,
        "verbose": False,
        **({"distill_type": kind} if token else {}),
    }
    task = (TokenDistillationTask if token else LogitDistillationTask)(
        ForTimm(lambda x: student(x.flatten(1))), ForTimm(taught), **options
    )
    scheme = Hard() if kind == "hard" else Soft(2.0)
    ours = Distill(Classify(0.1), lambda each: taught(each.images), scheme, 0.4)
    torch.testing.assert_close(ours(student, view(images.flatten(1), labels)), task(images, labels)["loss"])


def test_parts_add_up_to_the_whole() -> None:
    """As gradient accumulation asks."""
    task = Distill(Classify(), lambda each: 3 * each.images.sin(), Soft(2.0), 0.5)
    whole = view(torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]))
    parts = [task(Student(False), whole.part(slice(i, i + 3))) for i in (0, 3)]
    torch.testing.assert_close(torch.stack(parts).mean(), task(Student(False), whole))


# ---- runs


def teach(out: Path, teacher: Any, **keys: Any) -> Any:
    return run(out, **{"teacher": teacher, **keys})


def lines_of(session: Any) -> str:
    return "\n".join(session.trainer.task.lines)


def test_the_scheme_suits_the_student(teacher: Path, token_student: None) -> None:
    session = tiny.session(teacher=str(teacher))
    assert session.trainer.task.scheme == Hard()
    assert "hard, distillation token, 50% of the loss" in lines_of(session)
    session = tiny.session(teacher=str(teacher), distill="soft", temperature=3.0, distill_weight=0.1)
    assert session.trainer.task.scheme == Soft(3.0)
    assert session.trainer.task.weight == 0.1
    assert "temperature 3" in lines_of(session)
    assert "resnet20_32" in lines_of(session)
    assert "parameters, input 8x8 grey" in lines_of(session)


def test_without_a_token_the_logits_learn(teacher: Path) -> None:
    assert tiny.session(teacher=str(teacher)).trainer.task.scheme == Soft(1.0)
    assert "soft, temperature 1," in lines_of(tiny.session(teacher=str(teacher)))
    assert tiny.session(teacher=str(teacher), distill="hard").trainer.task.scheme == Hard()


def test_a_distilled_guest_of_timms_learns_by_its_token(teacher: Path) -> None:
    from vitrail.training.monitoring.progress import Reporter
    from vitrail.training.session import Session
    from vitrail.training.setup import prepare

    guest = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=8, patch_size=2, embed_dim=12, depth=1, num_heads=2
    )
    keys = {key: value for key, value in tiny.PLAIN.items() if key not in ("model", "drop_path")}
    setup = prepare(tiny.dataset(), make_config({**keys, "img_size": 8, "teacher": str(teacher)}), guest)
    session = Session(setup, Reporter(False), torch.device("cpu"))
    batch = next(session.loader.epoch(0))
    session.trainer.task(guest.train(), session.trainer.view(batch, 0)).backward()
    assert guest.head_dist.weight.grad.norm() > 0
    assert guest.distilled_training


@pytest.mark.parametrize("key", ["teacher", "distill", "distill_weight", "temperature"])
def test_every_key_changes_the_weights(key: str, teacher: Path) -> None:
    base = {"teacher": str(teacher)} if key != "teacher" else {}
    other = a_teacher(1).save(teacher.parent / "other")
    value = {"teacher": str(other), "distill": "hard", "distill_weight": 0.9, "temperature": 4.0}[key]
    assert not tiny.same(tiny.trained(**base), tiny.trained(**base, **{key: value}))


def test_another_teacher_makes_another_student(teacher: Path) -> None:
    other = a_teacher(1).save(teacher.parent / "other")
    assert not tiny.same(tiny.trained(teacher=str(teacher)), tiny.trained(teacher=str(other)))


def test_the_teacher_sees_each_view_its_own_way(teacher: Path) -> None:
    """What a view's loss is made of, computed another way: images undone to pixels, then the saved model's own."""
    session = tiny.session(teacher=str(teacher), flip=0.5, erase=0.5, mixup=0.4, batch_size=8)
    each = session.trainer.view(next(session.loader.epoch(0)), 0)
    student = session.setup.preprocess
    pixels = (each.images * student.std[0] + student.mean[0]) * 255
    expected = a_teacher().model.eval()(PREPROCESS.normalize(pixels))[:, [1, 2, 0]]
    assert_near(session.trainer.task.teacher(each), expected)


@pytest.mark.parametrize(
    ("keys", "kind", "fact"),
    [
        ({"distill": "hard"}, ConfigError, "distill .*teacher"),
        ({"distill_weight": 0.1}, ConfigError, "distill_weight .*teacher"),
        ({"temperature": 2.0}, ConfigError, "temperature .*teacher"),
        ({"teacher_outputs": "there"}, ConfigError, "teacher_outputs .*teacher"),
        ({"teacher": "resnet18"}, WeightsError, "resnet18"),
        ({"teacher": "missing.onnx"}, ModelError, r"missing\.onnx"),
        ({"teacher": True, "distill": "hard", "temperature": 2.0}, ConfigError, "temperature .*distill=soft"),
        ({"teacher": True, "distill_weight": 1.5}, ConfigError, r"distill_weight .*1\.5"),
        ({"teacher": True, "probe": True}, ConfigError, "teacher .* probe"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    keys: dict[str, Any],
    kind: type[VitrailError],
    fact: str,
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    keys = {**keys, **({"teacher": teacher} if keys.get("teacher") is True else {})}
    base = {"model": tiny.VARIANT.name} if keys.get("probe") else KEYS
    with pytest.raises(kind, match=fact) as error:
        train(tiny.dataset(), out=tmp_path / "run", progress=False, **{**base, **keys})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_classes_that_the_teacher_lacks_are_refused(tmp_path: Path) -> None:
    teacher = a_teacher()
    teacher.class_names = ("one", "two", "threee")
    teacher.save(tmp_path / "teacher")
    with pytest.raises(ModelError, match=r"'three'.*'threee'"):
        teach(tmp_path / "run", tmp_path / "teacher")


def test_a_distilled_run_resumes_bit_for_bit(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, token_student: None
) -> None:
    teach(tmp_path / "whole", teacher)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 9)
        with pytest.raises(Killed):
            teach(folder, teacher)
    train(tiny.dataset(), resume=folder, progress=False)
    assert_same(outcome(folder), outcome(tmp_path / "whole"))


def test_a_run_goes_on_with_its_own_teacher_only(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(out: Path, source: Any) -> None:
        with monkeypatch.context() as patch:
            kill_at(patch, Trainer, "step", 5)
            with pytest.raises(Killed):
                teach(out, source)

    killed(tmp_path / "named", teacher)
    a_teacher(1).save(teacher)
    with pytest.raises(RunError, match="teacher"):
        train(tiny.dataset(), resume=tmp_path / "named", progress=False)

    mine = a_teacher(2)
    killed(tmp_path / "object", mine)
    with pytest.raises(ConfigError, match="teacher="):
        train(tiny.dataset(), resume=tmp_path / "object", progress=False)
    with pytest.raises(ConfigError, match="teacher="):
        train(tiny.dataset(), resume=tmp_path / "object", teacher=a_teacher(3), progress=False)
    train(tiny.dataset(), resume=tmp_path / "object", teacher=mine, progress=False)
    teach(tmp_path / "whole", mine)
    assert_same(outcome(tmp_path / "object"), outcome(tmp_path / "whole"))


def test_a_teacher_by_name_by_object_and_by_module_is_one(tmp_path: Path, teacher: Path) -> None:
    teach(tmp_path / "name", teacher)
    teach(tmp_path / "object", a_teacher())
    assert_same(outcome(tmp_path / "name"), outcome(tmp_path / "object"))


# ---- stored outputs


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each view that the teacher was asked about."""
    asked: list[int] = []
    original = TeacherLogits.__call__

    def counted(self: TeacherLogits, each: View) -> Tensor:
        asked.append(len(each))
        return original(self, each)

    monkeypatch.setattr(TeacherLogits, "__call__", counted)
    return asked


def store_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/epoch-*.bin"))


@pytest.mark.parametrize("keys", [{"accumulate": 2}, {"mixup": 0.0, "cutmix": 0.0}], ids=str)
def test_a_second_run_replays_and_never_asks(
    keys: dict[str, Any], tmp_path: Path, teacher: Path, calls: list[int]
) -> None:
    store = tmp_path / "store"
    teach(tmp_path / "none", teacher, **keys)
    calls.clear()
    teach(tmp_path / "first", teacher, teacher_outputs=store, **keys)
    assert sum(calls) >= 12 * 10
    calls.clear()
    teach(tmp_path / "second", teacher, teacher_outputs=store, **keys)
    assert calls == []
    assert_same(outcome(tmp_path / "first"), outcome(tmp_path / "second"))
    assert_same(outcome(tmp_path / "none"), outcome(tmp_path / "first"))


@pytest.mark.parametrize("more", [{"balance": "sample"}, {"repeats": 3}], ids=str)
def test_repeated_views_of_an_image_are_kept_apart(
    more: dict[str, Any], tmp_path: Path, teacher: Path, calls: list[int]
) -> None:
    keys = {"mixup": 0.0, "cutmix": 0.0, **more, "teacher_outputs": tmp_path / "store"}
    teach(tmp_path / "first", teacher, **keys)
    assert calls
    calls.clear()
    teach(tmp_path / "second", teacher, **keys)
    assert calls == []
    assert_same(outcome(tmp_path / "first"), outcome(tmp_path / "second"))


def place(teacher: Path, **keys: Any) -> Path:
    """Where a run with these keys stores its outputs."""
    session = tiny.session(**{**KEYS, "teacher": str(teacher), "teacher_outputs": "there", **keys})
    folder: Path = session.trainer.task.teacher.folder
    return folder


def test_a_store_serves_other_students_and_other_schemes(tmp_path: Path, teacher: Path, calls: list[int]) -> None:
    for other in ({"lr": 1e-3}, {"distill": "hard"}, {"drop_path": 0.0}, {"epochs": 4}, {"ema": 0.0}, {"amp": "off"}):
        assert place(teacher, **other) == place(teacher), other
    keys: dict[str, Any] = {"teacher_outputs": tmp_path / "store"}
    teach(tmp_path / "one", teacher, **keys)
    calls.clear()
    teach(tmp_path / "two", teacher, **keys, distill="hard", epochs=4)
    assert sum(calls) == (20 - 12) * 10, "what is stored already is not asked again"


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"seed": 1},
            {"batch_size": 12},
            {"erase": 0.1},
            {"img_size": 12},
            {"crop_scale": (0.5, 1.0)},
            {"repeats": 2},
        ),
        *({"mixup": 0.0}, {"cutmix": 0.0}, {"balance": "sample"}, {"amp": "bf16"}, {"fit": "squash"}, {"in_chans": 3}),
    ],
    ids=str,
)
def test_other_settings_have_a_store_beside(change: dict[str, Any], teacher: Path) -> None:
    assert place(teacher, **change) != place(teacher)
    assert place(teacher, **change).parent == place(teacher).parent


def test_other_images_and_another_teacher_have_a_store_beside(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, data = a_teacher(1).save(teacher.parent / "other"), tiny.dataset()
    before = place(teacher)
    assert place(other) != before
    data.splits["train"].images[7, 0, 0] ^= 1
    monkeypatch.setattr(tiny, "dataset", lambda: data)
    assert place(teacher) != before


def test_files_that_change_are_other_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    split = FileSplit([str(path)], np.zeros(1, np.int64))
    before = _images(split)
    assert _images(split) == before
    os.utime(path, ns=(0, 0))
    assert _images(split) != before
    path.unlink()
    assert _images(split) != before


def test_a_killed_store_is_completed(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    store = tmp_path / "store"
    teach(tmp_path / "whole", teacher)
    with monkeypatch.context() as patch:
        kill_at(patch, Trainer, "step", 9)  # eight steps are done, and six in a checkpoint
        with pytest.raises(Killed):
            teach(tmp_path / "run", teacher, teacher_outputs=store)
    last = store_files(store)[-1]
    data = last.read_bytes()
    record = 8 + 8 + 3 * 4
    assert len(data) % record == 0
    last.write_bytes(data[: -record // 2])  # the last record cut short,
    damaged = bytearray(last.read_bytes())
    damaged[10 * record + 18] ^= 4  # one bit of the second step's turned,
    last.write_bytes(bytes(damaged) + bytes(record))  # and a page of zeros, as a lost power leaves them
    calls.clear()
    train(tiny.dataset(), resume=tmp_path / "run", progress=False)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))
    calls.clear()
    teach(tmp_path / "again", teacher, teacher_outputs=store)
    assert calls == []
    assert_same(outcome(tmp_path / "again"), outcome(tmp_path / "whole"))


def test_damage_is_asked_again_and_nothing_else(tmp_path: Path, teacher: Path, calls: list[int]) -> None:
    store = tmp_path / "store"
    teach(tmp_path / "one", teacher, teacher_outputs=store)
    for path in store_files(store):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    calls.clear()
    teach(tmp_path / "two", teacher, teacher_outputs=store)
    assert len(calls) == 3, "one view in each of the epochs"
    assert_same(outcome(tmp_path / "one"), outcome(tmp_path / "two"))


def test_steps_that_are_tried_out_are_not_stored(tmp_path: Path, teacher: Path, calls: list[int]) -> None:
    session = tiny.session(teacher=str(teacher), teacher_outputs=str(tmp_path / "store"))
    stored = session.trainer.task.teacher
    assert isinstance(stored, StoredLogits)
    each = session.trainer.view(next(session.loader.epoch(0)), 0)
    stored(each)
    assert not (tmp_path / "store").exists()
    stored.start_writing()
    said = stored(each)
    assert calls == [10, 10]
    stored.start_writing()
    assert torch.equal(stored(each), said)
    assert calls == [10, 10], "read, not computed"
    assert "10 stored" in stored.line


def test_a_store_that_is_not_what_it_says_is_refused(tmp_path: Path, teacher: Path) -> None:
    store = tmp_path / "store"
    teach(tmp_path / "one", teacher, teacher_outputs=store, epochs=0.2)
    about = next(store.glob("*/store.json"))
    facts = json.loads(about.read_text())
    assert facts["settings"]["seed"] == 0
    about.write_text("{}")
    with pytest.raises(RunError, match=r"store\.json"):
        teach(tmp_path / "two", teacher, teacher_outputs=store, epochs=0.2)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="teacher_outputs"):
        teach(tmp_path / "three", teacher, teacher_outputs=tmp_path / "file")


def test_a_full_disk_is_one_line(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from vitrail.training.objectives import teacher_cache as teacher_outputs

    class Full(teacher_outputs.FileIO):
        def write(self, data: Any) -> int:
            if len(data) < 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:90])

    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(teacher_outputs, "FileIO", Full)
        with pytest.raises(RunError, match="disk"):
            teach(tmp_path / "run", teacher, teacher_outputs=store)
    teach(tmp_path / "again", teacher, teacher_outputs=store)
    teach(tmp_path / "whole", teacher)
    assert_same(outcome(tmp_path / "again"), outcome(tmp_path / "whole"))


def test_the_command_takes_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vitrail.cli import main

    with pytest.raises(SystemExit) as left:
        main(["train", "digits", "--teacher", str(tmp_path / "missing"), "--out", str(tmp_path / "run")])
    assert left.value.code == 2
    assert "the teacher cannot be opened" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
