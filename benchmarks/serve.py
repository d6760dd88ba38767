"""What a service adds to the model: latency at concurrency 1 over a direct call, throughput at concurrency 16 over
offline batches, and the same beside LitServe with the same ONNX model.

    python -m benchmarks.serve exports/photos photos/*.jpg

Each service runs in a process of its own; rounds of all of them alternate. LitServe (pip install litserve) is left out
where it is not installed.
"""

import argparse
import http.client
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import write
from vitrail.classifier import load

PORTS = {"vitrail": 8301, "litserve": 8302}
CONCURRENCY = 16
LITSERVE = """
import io, sys
import litserve
import numpy as np
from fastapi import Request
from PIL import Image
from vitrail.classifier import load

class Api(litserve.LitAPI):
    def setup(self, device):
        self.engine = load(sys.argv[1]).engine()
        self.names = load(sys.argv[1]).class_names
    async def decode_request(self, request: Request):
        return await request.body()
    def batch(self, inputs):
        return inputs
    def predict(self, inputs):
        many = isinstance(inputs, list)
        (found,) = self.engine.stream(inputs if many else [inputs], len(inputs) if many else 1)
        return found.outputs if many else found.outputs[0]
    def unbatch(self, output):
        return list(output)
    def encode_response(self, output):
        best = np.argsort(-output)[:5]
        return {"top": [self.names[index] for index in best]}

if __name__ == "__main__":
    api = Api(max_batch_size=int(sys.argv[3]), batch_timeout=0.004)
    litserve.LitServer(api, accelerator="cpu").run(port=int(sys.argv[2]), generate_client_file=False, log_level="error")
"""


def ask(port: int, data: bytes, connection: http.client.HTTPConnection | None = None) -> float:
    """Seconds of a request."""
    start = time.perf_counter()
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/predict", data, {"Content-Type": "application/octet-stream"})
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"status {answer.status}: {body[:200]!r}")
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


def start_services(export: str, max_batch: int) -> dict[str, subprocess.Popen[bytes]]:
    serve = [sys.executable, "-m", "vitrail", "serve", export, "--port", str(PORTS["vitrail"]), "--no-access-log"]
    started = {"vitrail": subprocess.Popen(serve, stderr=subprocess.DEVNULL)}
    try:
        import litserve  # noqa: F401

        command = [sys.executable, "-c", LITSERVE, export, str(PORTS["litserve"]), str(max_batch)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started["litserve"] = subprocess.Popen(command, start_new_session=True, **quiet)
    except ImportError:
        pass
    return started


def wait_ready(name: str, data: bytes) -> float:
    """Seconds until the first answer."""
    start = time.perf_counter()
    while time.perf_counter() - start < 120:
        try:
            ask(PORTS[name], data)
            return time.perf_counter() - start
        except (OSError, RuntimeError, http.client.HTTPException):
            time.sleep(0.02)
    raise RuntimeError(f"{name} does not answer")


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
    services = start_services(arguments.export, arguments.max_batch)
    result: dict[str, Any] = {}
    try:
        ready = {name: wait_ready(name, images[0]) for name in services}
        rows: dict[str, dict[str, list[float]]] = {name: {"rate": [], "single": [], "many": []} for name in services}
        direct: list[float] = []
        offline: list[float] = []
        for _ in range(arguments.rounds):
            connections = {name: http.client.HTTPConnection("127.0.0.1", PORTS[name], timeout=60) for name in services}
            for data in images[:50]:
                start = time.perf_counter()
                list(engine.stream([data], 1))
                direct.append(time.perf_counter() - start)
                for name in services:
                    rows[name]["single"].append(ask(PORTS[name], data, connections[name]))
            start = time.perf_counter()
            for _ in engine.stream(images):
                pass
            offline.append(len(images) / (time.perf_counter() - start))
            for name in services:
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
                "of_offline": round(statistics.median(np.divide(row["rate"], offline)), 3),
                "p99_ms_at_16": percentile(row["many"], 0.99),
            }
    finally:
        for name, process in services.items():
            if name == "litserve":
                os.killpg(process.pid, signal.SIGTERM)
            process.terminate()
    direct_ms = {"p50": percentile(direct, 0.5), "p99": percentile(direct, 0.99)}
    result |= {"direct_ms": direct_ms, "offline_images_per_second": round(statistics.median(offline), 1)}
    for key, value in result.items():
        print(key, value)
    command = f"python -m benchmarks.serve {Path(arguments.export).name} ... --rounds {arguments.rounds}"
    write(arguments.name, command=command, requests=len(images), rounds=arguments.rounds, results=result)


if __name__ == "__main__":
    main()
