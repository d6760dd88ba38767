"""What each of several processes does in the tests of distributed training: train the tiny model, as told by JSON.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m training.ranks '{"out": "...", ...}'

Beside the keys of `train`: `end` = [step, signal, rank] sends a signal when so many steps are done, to that rank or,
for rank -1, to torchrun; `fail` = [step, rank] raises there; `broken` has the training images that cannot be read; and
`log` names files for what each rank learnt from and judged, and for the summary.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training import tiny
from training.runs import KEYS
from vitrail.errors import VitrailError
from vitrail.evaluation.metrics import Recorder
from vitrail.images.decode import BadImage
from vitrail.training.engine.interrupt import Stopped
from vitrail.training.engine.trainer import Trainer
from vitrail.training.run import train

# Nothing in it depends on the other images of a part, so that one process and two compute the same.
PLAIN = replace(tiny.VARIANT, name="vit_plain_patch2_8", config=replace(tiny.CONFIG, stem="patch", drop_path_rate=0.0))


class Broken:
    """A split of which some images cannot be read."""

    def __init__(self, split: Any, rows: list[int]) -> None:
        self.split, self.rows = split, rows
        self.labels, self.weights = split.labels, None

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int, *args: Any) -> Any:
        if row in self.rows:
            raise BadImage("cut short")
        return self.split.image(row, *args)

    def name(self, row: int) -> str:
        return str(self.split.name(row))


def main(asked: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    for variant in (tiny.VARIANT, PLAIN):
        tiny.VARIANTS[variant.name] = variant
    data, rank = tiny.dataset(), int(os.environ.get("RANK", "0"))
    if rows := asked.pop("broken", None):
        data.splits["train"] = Broken(data.splits["train"], rows)
    end, fail, log = asked.pop("end", None), asked.pop("fail", None), asked.pop("log", None)
    step, add, seen = Trainer.step, Recorder.add, []

    def stepped(self: Trainer, batch: Any) -> None:
        if fail == [self.state.steps, rank]:
            raise VitrailError("this one has had enough")
        seen.append([self.state.steps, batch.indices.tolist()])
        step(self, batch)
        if end and end[0] == self.state.steps and end[2] == rank:
            os.kill(os.getpid(), end[1])
        if end and end[0] == self.state.steps and end[2] == -1 and rank == 0:
            os.kill(os.getppid(), end[1])

    def added(self: Recorder, logits: Any, labels: Any, indices: Any) -> None:
        seen.append(["judged", indices.tolist()])
        add(self, logits, labels, indices)

    Trainer.step, Recorder.add = stepped, added  # type: ignore[method-assign]
    try:
        keys = asked if "resume" in asked else {**KEYS, **asked}
        classifier = train(data, progress=False, **keys)
        assert np.isfinite(classifier.report["loss"])
        if log:
            Path(f"{log}-{rank}.json").write_text(json.dumps([seen, classifier.report]))
    except Stopped as stopped:
        return 128 + stopped.signal
    except VitrailError as error:
        if not getattr(error, "reported_elsewhere", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    finally:
        Trainer.step, Recorder.add = step, add  # type: ignore[method-assign]
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
