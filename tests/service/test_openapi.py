"""/openapi.json is true: requests that schemathesis makes from it are answered as it says."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitrail
from service.running import Running, running, small_classifier

# That a tensor has as many values as its shape says cannot be written in a schema.
CONFIG = """
[[operations]]
include-path-regex = "/infer$"
checks.positive_data_acceptance.enabled = false
"""
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(small_classifier()) as found:
        yield found


def test_the_document_names_every_route(service: Running) -> None:
    document = service.request("GET", "/openapi.json").body
    for path in (
        "/predict",
        "/predict/batch",
        "/labels",
        "/healthz",
        "/readyz",
        "/metrics",
        "/v2/models/{model}/infer",
    ):
        assert path in document["paths"]
    schemas = document["components"]["schemas"]
    assert schemas["PredictionBody"]["examples"]
    for name in {part.partition('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}:
        assert name in schemas
    (explain,) = (each for each in document["paths"]["/predict"]["post"]["parameters"] if each["name"] == "explain")
    assert "relevance" in json.dumps(explain)


@pytest.mark.slow
def test_generated_requests(service: Running, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis")
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "service.openapi_hooks",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(Path(vitrail.__file__).parents[1])]),
    }
    command = [str(Path(sys.executable).parent / "schemathesis"), "run", "--max-examples", "20", "--seed", "1"]
    url = f"http://127.0.0.1:{service.port}/openapi.json"
    done = subprocess.run([*command, url], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout[-20000:]
    assert "16 passed" in done.stdout
