"""What it takes to ask a model folder, and exports of it, about one image: a whole process each, ours and a small
script with timm.

Counted are the seconds from the start of the process to its end (Python, imports, weights, decoding, the model) and the
most memory that it held. Both read the same vit_small_patch16_224 of random weights and the same photograph, and print
the five best classes, in float32; the two are the same five, or nothing is published. Files are in the cache of the
system: what is cold is the process.

Nothing here imports torch before the rounds are over: on Linux a child's peak counts what its parent held.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Comparison, interleave, publish

ROOT = Path(__file__).parents[1]
MAKE = """
import sys, torch
from PIL import Image
from sklearn.datasets import load_sample_image
from vitrail.classifier import Classifier
from vitrail.models.catalog import VARIANTS
from vitrail.pretrained.create import create_model
name = "vit_small_patch16_224"
torch.manual_seed(0)
model = create_model(name)
torch.nn.init.normal_(model.head.weight, std=0.1)
names = [f"class {number}" for number in range(model.num_classes)]
Classifier(model, VARIANTS[name].preprocess, names, architecture=name).save(sys.argv[1])
Image.fromarray(load_sample_image("china.jpg")).save(sys.argv[2], quality=92)
"""
THEIRS = """
import sys
import benchmarks.oracles
import timm, torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
transform = create_transform(**resolve_data_config({}, model=model))
with torch.inference_mode():
    logits = model(transform(Image.open(sys.argv[2]).convert("RGB")).unsqueeze(0))
scores, indices = logits.softmax(dim=1)[0].topk(5)
for score, index in zip(scores.tolist(), indices.tolist()):
    print(f"{model.pretrained_cfg['label_names'][index]}\\t{100 * score:.1f} %")
"""
OURS = [sys.executable, "-c", "from vitrail.cli import main; main()", "predict"]  # what the command `vitrail` runs


class Process:
    """A command that is run anew at every call; `peaks` are the most bytes that each run held."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.peaks: list[int] = []
        self.output = ""

    def __call__(self) -> None:
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            assert process.stderr is not None
            errors = process.stderr.read()
            process.stderr.close()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"{self.command[:3]} failed: {errors}")
            output.seek(0)
            self.output = output.read()
        self.peaks.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def peaks(ours: Process, theirs: Process, rounds: int, name: str) -> Comparison:
    """The same figures for memory, in bytes; more than 1 means that ours holds less."""
    pairs = list(zip(ours.peaks[-rounds:], theirs.peaks[-rounds:], strict=True))
    ratios = [b / a for a, b in pairs]
    return Comparison(
        name=name,
        ours="vitrail",
        theirs="timm",
        ours_median=statistics.median(a for a, _ in pairs),
        theirs_median=statistics.median(b for _, b in pairs),
        ratio_median=statistics.median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
        rounds=rounds,
        note="bytes: the peak of the resident memory of the process (ru_maxrss)",
    )


def check_agreement(ours: list[str], theirs: Process) -> None:
    """Raise RuntimeError unless both printed the same classes with the same scores, to a tenth of a per cent."""
    done = subprocess.run([*ours, "--json"], capture_output=True, text=True, check=True, cwd=ROOT)
    mine = [(row["label"], f"{100 * row['score']:.1f} %") for row in json.loads(done.stdout)["top"]]
    other = [tuple(line.split("\t")) for line in theirs.output.splitlines()]
    if mine != other:
        raise RuntimeError(f"the two do not agree: {mine} and {other}")


def exports(model: Path, folder: Path) -> list[Path]:
    """Exports of the model in float32 to the runtimes that are installed."""
    found = []
    for target, package in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        if find_spec(package):
            options = ["--target", target, "--precision", "fp32", "--min-speedup", "0", "--out", folder / target]
            command = [sys.executable, "-m", "vitrail", "export", model, *options]
            subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
            found.append(folder / target)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    results, memory = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder, image = Path(temporary, "model"), Path(temporary, "photo.jpg")
        subprocess.run([sys.executable, "-c", MAKE, folder, image], check=True, cwd=ROOT)
        theirs = Process([sys.executable, "-c", THEIRS, str(folder), str(image)])
        for source in (folder, *exports(folder, Path(temporary))):
            exact = ["--precision", "off"] if source == folder else []  # an export has its own: float32
            ours = Process([*OURS, str(source), str(image), "--top", "5", *exact])
            work = f"cold predict of one photograph, vit_small_patch16_224, {source.name}"
            results.append(interleave(f"{work}: seconds", ("vitrail", ours), ("timm", theirs), rounds=rounds))
            check_agreement(ours.command, theirs)
            memory.append(peaks(ours, theirs, rounds, f"{work}: bytes"))
    environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS",)}
    publish("predict_cold", results, memory=[vars(each) for each in memory], environment=environment)
    for each in memory:
        print(
            f"{each.name}: vitrail {each.ours_median / 2**20:.0f} MiB, timm {each.theirs_median / 2**20:.0f} MiB, "
            f"{each.ratio_median:.2f}x as small ({each.ratio_min:.2f} to {each.ratio_max:.2f})"
        )


if __name__ == "__main__":
    main()
