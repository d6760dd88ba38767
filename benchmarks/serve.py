"""What a service adds to the model: latency at concurrency 1 over a direct call, throughput at concurrency 16 over
offline batches, and the same beside LitServe with the same ONNX model.

    python -m benchmarks.serve exports/photos photos/*.jpg

LitServe runs twice: with Pillow and onnxruntime, as one writes it from LitServe's documentation and the export's README
("litserve"), and with vitrail's own engine, which compares the servers alone ("litserve, vitrail's engine"). Each
service runs in a process of its own; rounds of all of them alternate, requests of one client in an order that changes,
and those that are not measured are suspended.
LitServe (pip install litserve) is left out where it is not installed.
"""

import argparse
import http.client
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import write
from vitrail.classifier import load
from vitrail.inference.engine import Engine

PORTS = {"vitrail": 8301, "litserve": 8302, "litserve, vitrail's engine": 8303}
CONCURRENCY = 16
REST = 0.02  # seconds before what is timed, in which threads of a process that is resumed go back to their waiting
BOUNDARY = "2a1c6d9e0b"
FORM = (  # a form with one file, which both services take
    f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    "Content-Type: image/jpeg\r\n\r\n".encode(),
    f"\r\n--{BOUNDARY}--\r\n".encode(),
)
# What both have in common; the argument is the export. Answers: the five most probable classes.
_LITSERVE = """
import io, json, sys
from pathlib import Path
import litserve
import numpy as np
from fastapi import Request

class Api(litserve.LitAPI):
    def batch(self, inputs):
        return inputs
    def unbatch(self, output):
        return list(output)
    def encode_response(self, output):
        best = np.argsort(-output)[:5]
        return {{"top": [[self.names[index], float(output[index])] for index in best]}}
{methods}
if __name__ == "__main__":
    api = Api(max_batch_size=int(sys.argv[3]), batch_timeout=0.004)
    litserve.LitServer(api, accelerator="cpu").run(port=int(sys.argv[2]), generate_client_file=False, log_level="error")
"""
LITSERVE = {
    "litserve": """
    def setup(self, device):
        import onnxruntime
        export = json.loads(Path(sys.argv[1], "export.json").read_text())
        self.names, preprocess = export["class_names"], export["preprocess"]
        assert preprocess["crop_mode"] == "center"
        from PIL import Image
        self.filter = Image.Resampling[preprocess["interpolation"].upper()]
        self.mode = "L" if preprocess["channels"] == 1 else "RGB"
        self.side, self.scale = preprocess["size"][0], preprocess["size"][0] / preprocess["crop_pct"]
        self.session = onnxruntime.InferenceSession(Path(sys.argv[1], "model.onnx"))
    def decode_request(self, request: Request):
        from PIL import Image, ImageOps
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(request["file"].file.read()))).convert(self.mode)
        factor = self.scale / min(image.size)
        image = image.resize([round(factor * side) for side in image.size], self.filter)
        left, top = ((side - self.side) // 2 for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + self.side, top + self.side)))
        return pixels.reshape(self.side, self.side, -1)
    def predict(self, inputs):
        many = isinstance(inputs, list)
        batch = np.stack(inputs) if many else inputs[None]
        probabilities = self.session.run(["probabilities"], {"images": batch})[0]
        return probabilities if many else probabilities[0]
""",
    "litserve, vitrail's engine": """
    def setup(self, device):
        from vitrail.classifier import load
        self.engine = load(sys.argv[1]).engine()
        self.names = load(sys.argv[1]).class_names
    def decode_request(self, request: Request):
        return request["file"].file.read()
    def predict(self, inputs):
        many = isinstance(inputs, list)
        (found,) = self.engine.stream(inputs if many else [inputs], len(inputs) if many else 1)
        return found.outputs if many else found.outputs[0]
""",
}


def ask(port: int, data: bytes, connection: http.client.HTTPConnection | None = None) -> float:
    """Seconds of a request."""
    start = time.perf_counter()
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(
        "POST", "/predict", FORM[0] + data + FORM[1], {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    )
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {body[:200]!r}")
    return time.perf_counter() - start


def call(engine: Engine, data: bytes) -> float:
    """Seconds of a direct call."""
    start = time.perf_counter()
    list(engine.stream([data], 1))
    return time.perf_counter() - start


def throughput(port: int, images: list[bytes]) -> tuple[float, list[float]]:
    """Images a second at concurrency 16, and the seconds of each request."""

    def work(part: list[bytes]) -> list[float]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        return [ask(port, data, connection) for data in part]

    start = time.perf_counter()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        times = [each for part in pool.map(work, (images[i::CONCURRENCY] for i in range(CONCURRENCY))) for each in part]
    return len(images) / (time.perf_counter() - start), times


def commands(export: str, max_batch: int, folder: str) -> dict[str, list[str]]:
    """Of each service."""
    found = {"vitrail": ["-m", "vitrail", "serve", export, "--port", str(PORTS["vitrail"]), "--no-access-log"]}
    if find_spec("litserve"):
        for name, methods in LITSERVE.items():
            script = Path(folder, f"served{PORTS[name]}.py")  # a file: LitServe's workers import it
            script.write_text(_LITSERVE.format(methods=methods))
            found[name] = [str(script), export, str(PORTS[name]), str(max_batch)]
    return found


def start(command: list[str]) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, *command], start_new_session=True, stdout=quiet, stderr=quiet)


def wait_ready(name: str, data: bytes) -> float:
    """Seconds until the first answer."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < 120:
        try:
            ask(PORTS[name], data)
            return time.perf_counter() - begin
        except (OSError, RuntimeError, http.client.HTTPException):
            time.sleep(0.02)
    raise RuntimeError(f"{name} does not answer")


def only(services: dict[str, subprocess.Popen[bytes]], name: str | None = None) -> None:
    """Let this service run and suspend the others, which take time of the CPU also when nobody asks them."""
    for each, process in services.items():
        os.killpg(process.pid, signal.SIGCONT if each == name else signal.SIGSTOP)
    time.sleep(REST)


def percentile(values: list[float], share: float) -> float:
    return round(1000 * float(np.percentile(values, 100 * share)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=200, help="of a round")
    parser.add_argument("--max-batch", type=int, default=8, help="of LitServe")
    parser.add_argument("--name", default="serve", help="name of the JSON file in benchmarks/results")
    arguments = parser.parse_args()
    read = [Path(path).read_bytes() for path in arguments.images]
    images = [read[index % len(read)] for index in range(arguments.requests)]
    engine = load(arguments.export).engine()
    folder = tempfile.TemporaryDirectory()
    services: dict[str, subprocess.Popen[bytes]] = {}
    result: dict[str, Any] = {}
    try:
        ready = {}
        for name, command in commands(arguments.export, arguments.max_batch, folder.name).items():
            services[name] = start(command)
            ready[name] = wait_ready(name, images[0])
            only(services)
        rows: dict[str, dict[str, list[float]]] = {name: {"rate": [], "single": [], "many": []} for name in services}
        shuffle = random.Random(0).shuffle
        direct: list[float] = []
        offline: list[float] = []
        for _ in range(arguments.rounds):
            connections = {name: http.client.HTTPConnection("127.0.0.1", PORTS[name], timeout=60) for name in services}
            order: list[str | None] = [None, *services]  # None: a direct call
            for data in images[:50]:
                shuffle(order)
                for name in order:
                    only(services, name)
                    if name is None:
                        direct.append(call(engine, data))
                    else:
                        rows[name]["single"].append(ask(PORTS[name], data, connections[name]))
            only(services)
            begin = time.perf_counter()
            for _ in engine.stream(images):
                pass
            offline.append(len(images) / (time.perf_counter() - begin))
            for name in services:
                only(services, name)
                rate, times = throughput(PORTS[name], images)
                rows[name]["rate"].append(rate)
                rows[name]["many"] += times
        for name, row in rows.items():
            result[name] = {
                "ready_seconds": round(ready[name], 2),
                "added_ms": {
                    "p50": round(percentile(row["single"], 0.5) - percentile(direct, 0.5), 2),
                    "p99": round(percentile(row["single"], 0.99) - percentile(direct, 0.99), 2),
                },
                "images_per_second": round(statistics.median(row["rate"]), 1),
                "of_offline": round(float(np.median(np.divide(row["rate"], offline))), 3),
                "p50_ms_at_16": percentile(row["many"], 0.5),
                "p99_ms_at_16": percentile(row["many"], 0.99),
            }
    finally:
        for process in services.values():
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
    direct_ms = {"p50": percentile(direct, 0.5), "p99": percentile(direct, 0.99)}
    result |= {"direct_ms": direct_ms, "offline_images_per_second": round(statistics.median(offline), 1)}
    for key, value in result.items():
        print(key, value)
    shown = f"python -m benchmarks.serve {Path(arguments.export).name} ... --rounds {arguments.rounds}"
    write(arguments.name, command=shown, requests=len(images), rounds=arguments.rounds, results=result)


if __name__ == "__main__":
    main()
