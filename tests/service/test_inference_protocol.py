"""The Open Inference Protocol, spoken by Triton's own client, and what does not follow it."""

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from service.running import NAMES, Running, encoded, running, small_classifier

http = pytest.importorskip("tritonclient.http", exc_type=ImportError)

CLASSIFIER = small_classifier()
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
LOGITS = CLASSIFIER.engine().runtime.logits(PIXELS)


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with running(CLASSIFIER, max_files=8) as found:
        yield found


@pytest.fixture
def client(service: Running) -> Iterator[Any]:
    client = http.InferenceServerClient(f"127.0.0.1:{service.port}")
    yield client
    client.close()


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    found = client.get_model_metadata("tiny")
    assert found["inputs"][1] == {"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]}
    assert [each["name"] for each in found["outputs"]] == ["logits", "probabilities", "labels"]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("name", ["images", "pixels"])
def test_tensors(client: Any, name: str, binary: bool) -> None:
    values = PIXELS if name == "pixels" else (PIXELS.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    tensor = http.InferInput(name, list(values.shape), "UINT8" if name == "pixels" else "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(values), binary_data=binary)
    outputs = [http.InferRequestedOutput(output, binary_data=binary) for output in ("logits", "labels")]
    found = client.infer("tiny", [tensor], outputs=outputs)
    np.testing.assert_allclose(found.as_numpy("logits"), LOGITS, atol=1e-5)
    labels = [each.decode() if isinstance(each, bytes) else each for each in found.as_numpy("labels")]
    assert labels == [NAMES[index] for index in LOGITS.argmax(1)]


@pytest.mark.parametrize("binary", [True, False])
def test_files(client: Any, binary: bool) -> None:
    data = [encoded(1), encoded(2, kind="JPEG")]
    tensor = http.InferInput("files", [2], "BYTES")
    if binary:
        tensor.set_data_from_numpy(np.array(data, dtype=object))
    else:
        texts = np.array([base64.b64encode(each).decode() for each in data], dtype=object)
        tensor.set_data_from_numpy(texts, binary_data=False)
    found = client.infer("tiny", [tensor], request_id="7")
    expected = CLASSIFIER.engine().stream(data)
    np.testing.assert_allclose(found.as_numpy("logits"), next(iter(expected)).outputs, atol=1e-5)
    assert found.get_response()["id"] == "7"


def test_a_damaged_file_is_an_error(client: Any) -> None:
    tensor = http.InferInput("files", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"no image"], dtype=object))
    with pytest.raises(http.InferenceServerException, match="not an image"):
        client.infer("tiny", [tensor])


def request(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [0] * 3072}
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        (b"", "JSON"),
        (b"[" * 100_000, "recursion"),
        (b'{"inputs": ' + b"[" * 100_000, "recursion"),
        ({"inputs": []}, "at least 1 item"),
        ({"inputs": "x"}, "inputs"),
        (request(name="other"), "'other'"),
        (request(datatype="FP64"), "FP64"),
        (request(shape=[1, 8, 8, 3]), "1x8x8x3"),
        (request(shape=[9, 32, 32, 3]), "9x32x32x3"),
        (request(shape=[0, 32, 32, 3]), "0x32x32x3"),
        (request(shape=[1 << 60, 32, 32, 3]), "shape"),
        (request(data=[0] * 5), "3072 numbers"),
        (request(data=["0"] * 3072), "3072 numbers"),
        (request(data=[300] * 3072), "0 to 255"),
        (request(data=[0.5] * 3072), "0 to 255"),
        (request(data=None), "no data"),
        (request(data=None, parameters={"binary_data_size": 5}), "binary data"),
        (request(data=None, parameters={"binary_data_size": "x"}), "binary data"),
        (request(name="images", datatype="FP32", shape=[1, 3, 32, 32], data=[2.0] * 3072), "0 to 1"),
        (request(name="files", datatype="BYTES", shape=[1], data=["%%"]), "base64"),
        (request() | {"outputs": [{"name": "secret"}]}, "'secret'"),
    ],
)
def test_what_does_not_follow_the_protocol(service: Running, body: Any, fact: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = service.request("POST", "/v2/models/tiny/infer", data, Content_Type="application/json")
    assert answer.status == 400, answer.content
    assert fact in answer.body["error"], answer.content


@pytest.mark.parametrize("length", ["-1", "x", "99999", "1" * 5000, "٣"])
def test_a_wrong_length_of_the_json(service: Running, length: str) -> None:
    answer = service.request(
        "POST", "/v2/models/tiny/infer", json.dumps(request()).encode(), Inference_Header_Content_Length=length.encode()
    )
    assert answer.status == 400
    assert "length" in answer.body["error"]


def test_an_unknown_model(service: Running) -> None:
    for path in ("/v2/models/other", "/v2/models/tiny/versions/9", "/v2/models/other/ready"):
        assert service.request("GET", path).status == 404
    assert service.request("POST", "/v2/models/other/infer", b"{}").status == 404
