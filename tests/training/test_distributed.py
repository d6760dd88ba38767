"""Several processes: the same run as one, every image counted once, and stopped and taken up again like one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import tiny
from training.ranks import PLAIN, main
from training.runs import assert_same, outcome, timeless
from vitrail.errors import DeviceError, DistributedError
from vitrail.models.build import build_model
from vitrail.training.checkpoints.checkpoint import load_checkpoint
from vitrail.training.engine.parallel import blocks
from vitrail.training.run import train
from vitrail.utils.device import pick_device
from vitrail.utils.distributed import SINGLE_PROCESS, DistributedContext

SAME = {"model": PLAIN.name, "drop": 0.0, "drop_path": 0.0, "batch_size": 12}  # what one process and two compute alike


@pytest.fixture(autouse=True)
def _variants(monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in (tiny.VARIANT, PLAIN):
        monkeypatch.setitem(tiny.VARIANTS, variant.name, variant)


def launch(processes: int, **asked: Any) -> subprocess.CompletedProcess[str]:
    """Train in so many processes. What they say is in stderr."""
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [
        sys.executable,
        *(runner if processes > 1 else []),
        "-m",
        "training.ranks",
        json.dumps(asked, default=str),
    ]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)


def trained(processes: int, folder: Path, **asked: Any) -> dict[str, Any]:
    done = launch(processes, **asked)
    assert done.returncode == 0, done.stderr
    return outcome(folder)


def logs(path: Path, processes: int) -> list[list[Any]]:
    return [json.loads(Path(f"{path}-{rank}.json").read_text())[0] for rank in range(processes)]


def assert_close(one: dict[str, Any], two: dict[str, Any], tolerance: float = 1e-3) -> float:
    """Weights, averages and figures agree within rounding. Returns the largest difference of the weights.

    The bias of the keys shifts all scores of a query alike, which softmax does not see: its gradient is nothing but
    rounding, which AdamW makes steps of full size of. It is left out.
    """
    assert len(one["metrics"]) == len(two["metrics"])
    for mine, theirs in zip(one["metrics"], two["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance, abs=tolerance)
    worst = 0.0
    for part in ("model", "ema"):
        for name, value in one["tensors"][part].items():
            pair = [value.double(), two["tensors"][part][name].double()]
            if name.endswith("qkv.bias"):
                pair = [torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in pair]
            torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance, msg=f"{part} {name}")
            worst = max(worst, float((pair[0] - pair[1]).abs().max()))
    return worst


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """The same images in each step, mixed with the same partners; losses and weights within rounding; each validation
    and test image judged once."""
    two = trained(2, tmp_path / "two", out=tmp_path / "two", log=tmp_path / "log2", **SAME)
    assert main({"out": str(tmp_path / "one"), "log": str(tmp_path / "log1"), **SAME}) == 0
    one = outcome(tmp_path / "one")
    assert_close(one, two)
    assert one["summary"]["images"] == two["summary"]["images"] == 15
    assert two["summary"]["processes"] == 2
    assert one["summary"]["per_class"] == two["summary"]["per_class"]
    (alone,), ranks = logs(tmp_path / "log1", 1), logs(tmp_path / "log2", 2)
    steps = [rows for step, rows in alone if step != "judged"]
    parts = [[rows for step, rows in rank if step != "judged"] for rank in ranks]
    assert steps == [first + second for first, second in zip(*parts, strict=True)]
    judged = [sorted(row for rank in logs_ for row in rank) for logs_ in ([_judged(alone)], map(_judged, ranks))]
    assert judged[0] == judged[1]
    assert len(judged[0]) == 3 * 12 + 15
    records = [json.loads(Path(f"{tmp_path}/log2-{rank}.json").read_text())[1] for rank in (0, 1)]
    assert records[0]["top1"] == records[1]["top1"], "all processes give the same report"


def _judged(log: list[Any]) -> list[int]:
    return [row for step, rows in log if step == "judged" for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"broken": [*range(7), 20, 33], "mixup": 0.0, "cutmix": 0.0},
        {"broken": [*range(7), 20, 33], "mixup": 0.0, "cutmix": 0.0, "accumulate": 4},
        {"broken": [row for row in range(50) if row % 7], "mixup": 0.0, "cutmix": 0.0, "batch_size": 4},
        {"accumulate": 2, "balance": "loss"},
        {"shard": True, "accumulate": 2},
        {"shard": True, "broken": [*range(7), 20, 33], "mixup": 0.0, "cutmix": 0.0},
        {"merge": 4},
        {"merge": 4, "shard": True},
    ],
    ids=[
        "unreadable",
        "unreadable parts",
        "mostly unreadable",
        "parts",
        "sharded parts",
        "sharded unreadable",
        "merged tokens",
        "sharded merged tokens",
    ],
)
def test_replaced_images_and_parts_give_the_mean_over_all_images(keys: dict[str, Any], tmp_path: Path) -> None:
    keys = {**SAME, **keys}
    two = trained(2, tmp_path / "two", out=tmp_path / "two", **keys)
    one = trained(1, tmp_path / "one", out=tmp_path / "one", **keys)
    assert_close(one, two)
    assert [line["train_images"] for line in one["metrics"]] == [line["train_images"] for line in two["metrics"]]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_killed_and_taken_up_again(shard: bool, tmp_path: Path) -> None:
    """By as many processes, bit for bit; by one, within rounding; and from one to two."""
    keys = {**SAME, "shard": shard, "epochs": 4, "checkpoint_every": 3}
    whole = trained(2, tmp_path / "whole", out=tmp_path / "whole", **keys)
    for again in (2, 1):
        folder = tmp_path / f"by-{again}"
        done = launch(2, out=folder, end=[8, signal.SIGKILL, 1], **keys)
        assert done.returncode != 0
        lost = [line for line in done.stderr.splitlines() if "a process of this run was lost" in line]
        assert len(lost) == 1, done.stderr
        assert f"--resume {folder}" in lost[0]
        found = load_checkpoint(folder / "checkpoint")
        assert found is not None
        assert found.record["state"]["steps"] == 6
        result = trained(again, folder, resume=folder)
        if again == 2:
            assert_same(result, whole)
        else:
            worst = assert_close(result, whole)
            print(f"from 2 processes to 1, split {shard}: weights differ by {worst:.2g} at most")
    folder = tmp_path / "from-1"
    assert launch(1, out=folder, end=[8, signal.SIGKILL, 0], **keys).returncode == -signal.SIGKILL
    assert_close(trained(2, folder, resume=folder), whole)


@pytest.mark.slow
def test_everything_with_a_state_is_taken_up_again(tmp_path: Path) -> None:
    """Batch norm with statistics of its own in each process, dropout, mixing; three processes, whose sums have an
    order."""
    keys = {"batch_size": 12, "epochs": 3}
    whole = trained(3, tmp_path / "whole", out=tmp_path / "whole", mixup=0.4, **keys)
    folder = tmp_path / "run"
    assert launch(3, out=folder, end=[6, signal.SIGKILL, 2], mixup=0.4, **keys).returncode != 0
    assert_same(trained(3, folder, resume=folder), whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_the_run(number: int, tmp_path: Path) -> None:
    whole = trained(2, tmp_path / "whole", out=tmp_path / "whole", **SAME)
    folder = tmp_path / "run"
    done = launch(2, out=folder, end=[5, number, -1], **SAME)
    assert done.returncode != 0
    found = load_checkpoint(folder / "checkpoint")
    assert found is not None
    assert found.record["state"]["steps"] not in (0, 3)
    assert_same(trained(2, folder, resume=folder), whole)


@pytest.mark.slow
def test_a_fault_in_one_process_ends_all_with_one_line(tmp_path: Path) -> None:
    done = launch(2, out=tmp_path / "run", fail=[4, 1], **SAME)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "error: " in line] == ["error: this one has had enough"]
    done = launch(2, out=tmp_path / "run", **SAME)
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(told) == 1
    assert "--resume" in told[0]
    trained(2, tmp_path / "run", resume=tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"compile": True}, "compile=true"),
        ({"batch_size": 10, "mixup": 0.4}, "batch_size=10"),
        ({"batch_size": 11}, "batch_size=11"),
        ({"batch_size": "auto"}, "leave out torchrun"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    done = launch(2, out=tmp_path / "run", **{**SAME, **keys})
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(told) == 1, done.stderr
    assert words in told[0]


def test_a_world_of_one_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nobody is to be asked")

    for name in ("all_gather_object", "broadcast_object_list", "all_gather", "all_reduce", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, asked)
    tensor = torch.tensor([1.0, 2.0])
    SINGLE_PROCESS.all_reduce(tensor)
    assert SINGLE_PROCESS.all_gather_object("a") == ["a"]
    assert SINGLE_PROCESS.broadcast_object(3) == 3
    assert SINGLE_PROCESS.all_gather_numbers(1, 2.5) == [[1, 2.5]]
    assert SINGLE_PROCESS.run_on_main(lambda: 7) == 7
    assert tensor.tolist() == [1.0, 2.0]


def test_blocks_are_found_in_every_family() -> None:
    assert len(blocks(build_model(tiny.CONFIG))) == 2
    import timm

    assert len(blocks(timm.create_model("vit_tiny_patch16_224", num_classes=3))) == 12
    assert len(blocks(timm.create_model("resnet18", num_classes=3))) == 8
    assert blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


def test_each_process_takes_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu", 1) == pick_device("auto", 3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == pick_device("cuda", 1) == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="cuda:2"):
        pick_device("auto", 2)


def test_half_an_environment_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DistributedError, match="RANK is not set"):
        train(tiny.dataset(), progress=False)


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    from vitrail.training.checkpoints.run_folder import RunFolder

    folder = RunFolder(tmp_path / "none", writes=DistributedContext(1, 2).is_main)
    with folder.lock():
        folder.write_config("a")
        folder.write_metrics([timeless({"epoch": 1})])
        folder.append(folder.metrics, {"epoch": 2})
        folder.append(folder.sessions, {"command": "x"})
    assert not folder.path.exists()
