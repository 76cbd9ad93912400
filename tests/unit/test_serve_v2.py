"""The Open Inference Protocol v2, spoken by the unmodified tritonclient; and everything it must refuse."""

import gzip
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.http as triton
from endpoints import INFER, WIDTH, LocalServer, binary_request, local_server, make_checkpoint
from tritonclient.utils import InferenceServerException

from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.manifest import FeatureSpec
from serve.protocol.errors import ApiError
from serve.protocol.open_inference import check_datatype

RNG = np.random.default_rng(0)
EVENT = RNG.random((3, WIDTH), dtype=np.float32)
TARGET = RNG.random((3, WIDTH), dtype=np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(make_checkpoint(tmp_path_factory.mktemp("v2") / "checkpoint"), max_batch=8, max_queue=64) as it:
        yield it


@pytest.fixture(scope="module")
def expected(server: LocalServer) -> Any:
    """What the adapter says, asked without any of the endpoint's code."""
    adapter = load_checkpoint(Path(server.endpoint.cfg.checkpoint)).adapter

    def forward(values: Any) -> Any:
        with torch.no_grad():
            return adapter(torch.from_numpy(np.ascontiguousarray(values, np.float32))).numpy()

    return forward


def cosines(a: Any, b: Any) -> Any:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def tensor(name: str, values: Any, datatype: str, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def ask(server: LocalServer, inputs: list[triton.InferInput], **more: Any) -> triton.InferResult:
    client = triton.InferenceServerClient(server.url)
    try:
        return client.infer("alignment-adapter", inputs, **more)
    finally:
        client.close()


def test_health_and_metadata_are_as_the_client_reads_them(server: LocalServer) -> None:
    client = triton.InferenceServerClient(server.url)
    version = server.endpoint.model.version
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("alignment-adapter")
    assert client.is_model_ready("alignment-adapter", version)
    assert not client.is_model_ready("alignment-adapter", "another")
    assert not client.is_model_ready("another")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("alignment-adapter")
    assert metadata["versions"] == [version]
    assert [(i["name"], i["datatype"], i["shape"]) for i in metadata["inputs"]] == [
        ("event", "UINT8", [-1, WIDTH]),
        ("target", "UINT8", [-1, WIDTH]),
    ]
    assert [o["name"] for o in metadata["outputs"]] == ["aligned", "cos_sim", "accepted"]
    client.close()


@pytest.mark.parametrize("binary", [True, False])
def test_aligned_features_are_the_adapters(server: LocalServer, expected: Any, binary: bool) -> None:
    result = ask(server, [tensor("event", EVENT, "FP32", binary)])
    np.testing.assert_allclose(result.as_numpy("aligned"), expected(EVENT), rtol=1e-5, atol=1e-5)
    assert [o["name"] for o in result.get_response()["outputs"]] == ["aligned"]


def test_every_datatype_is_read_as_what_it_is(server: LocalServer, expected: Any) -> None:
    pixels = (EVENT * 255).astype(np.uint8)
    half = EVENT.astype(np.float16)
    bf16 = EVENT.astype(ml_dtypes.bfloat16)
    for values, datatype, seen in (
        (pixels, "UINT8", pixels / np.float32(255)),
        (half, "FP16", half.astype(np.float32)),
        (bf16, "BF16", bf16.astype(np.float32)),
    ):
        result = ask(server, [tensor("event", values, datatype)])
        np.testing.assert_allclose(result.as_numpy("aligned"), expected(seen), rtol=1e-5, atol=1e-5)


def test_a_target_brings_cosine_and_verdict_at_theta(server: LocalServer, expected: Any) -> None:
    own = cosines(expected(EVENT), TARGET)
    theta = float(np.sort(own)[1])  # strictly above: the middle one is not accepted
    inputs = [tensor("event", EVENT, "FP32"), tensor("target", TARGET, "FP32")]
    result = ask(server, inputs, parameters={"theta": theta + 1e-6}, request_id="mine")
    np.testing.assert_allclose(result.as_numpy("cos_sim"), own, atol=1e-6)
    assert result.as_numpy("accepted").dtype == np.bool_
    assert result.as_numpy("accepted").tolist() == (own > theta + 1e-6).tolist()
    assert sum(result.as_numpy("accepted").tolist()) == 1
    assert result.get_response()["id"] == "mine"
    assert result.get_response()["model_version"] == server.endpoint.model.version


def test_only_what_was_asked_for_is_sent(server: LocalServer) -> None:
    wanted = [triton.InferRequestedOutput("cos_sim", binary_data=True)]
    inputs = [tensor("event", EVENT, "FP32"), tensor("target", TARGET, "FP32")]
    result = ask(server, inputs, outputs=wanted)
    assert result.as_numpy("aligned") is None
    assert result.get_response()["outputs"] == [
        {"name": "cos_sim", "datatype": "FP32", "shape": [3], "parameters": {"binary_data_size": 12}}
    ]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_requests_are_read(server: LocalServer, expected: Any, algorithm: str) -> None:
    result = ask(server, [tensor("event", EVENT, "FP32")], request_compression_algorithm=algorithm)
    np.testing.assert_allclose(result.as_numpy("aligned"), expected(EVENT), rtol=1e-5, atol=1e-5)


def test_every_answer_names_the_model_and_the_request(server: LocalServer) -> None:
    body, headers = binary_request(EVENT)
    status, answer, _ = server.ask("POST", INFER, body, {**headers, "x-request-id": "seven"})
    assert status == 200
    assert answer["x-model-digest"] == server.endpoint.model.identity.digest
    assert answer["x-model-version"] == server.endpoint.model.version
    assert "total;dur=" in answer["server-timing"]
    status, problem = server.json("POST", INFER, b"", headers={"x-request-id": "eight"})
    assert (status, problem["request_id"]) == (400, "eight")


def row(value: float = 0.5) -> Any:
    return np.full((1, WIDTH), value, np.float32)


def with_value(value: float) -> Any:
    values = np.repeat(row(), 2, axis=0)
    values[1, 7] = value
    return values


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (with_value(np.nan), "not_finite"),
        (with_value(np.inf), "not_finite"),
        (with_value(-np.inf), "not_finite"),
        (with_value(3e38), "not_finite"),
        (np.zeros((2, WIDTH), np.float32), "zero_norm"),
        (np.ones((1, WIDTH - 1), np.float32), "width"),
        (np.ones((1, WIDTH * 2), np.float32), "width"),
        (np.ones((9, WIDTH), np.float32), "batch_limit"),
        (np.ones((0, WIDTH), np.float32), "shape"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_reason(server: LocalServer, event: Any, code: str) -> None:
    body, headers = binary_request(event)
    status, answer, data = server.ask("POST", INFER, body, headers)
    problem = json.loads(data)
    assert (status, problem["code"], problem["status"]) == (422, code, 422)
    assert answer["content-type"] == "application/problem+json"
    assert problem["error"] == problem["detail"]
    assert server.ask("GET", "/v2/health/ready")[0] == 200


def test_the_client_shows_what_is_wrong(server: LocalServer) -> None:
    with pytest.raises(InferenceServerException, match="row 1 contains NaN, Inf") as caught:
        ask(server, [tensor("event", with_value(np.nan), "FP32")])
    assert caught.value.status() == "422"
    with pytest.raises(InferenceServerException, match="'target' row 0 is all zeros"):
        ask(server, [tensor("event", row(), "FP32"), tensor("target", row(0.0), "FP32")])
    with pytest.raises(InferenceServerException, match="'event' has 3 rows and 'target' 1"):
        ask(server, [tensor("event", EVENT, "FP32"), tensor("target", row(), "FP32")])
    with pytest.raises(InferenceServerException, match="there is no model of this name"):
        triton.InferenceServerClient(server.url).infer("another", [tensor("event", row(), "FP32")])


RAW = {"binary_data_size": WIDTH * 4}


def event_input(**changes: Any) -> dict[str, Any]:
    item = {"name": "event", "shape": [1, WIDTH], "datatype": "FP32", "data": [0.5] * WIDTH, **changes}
    return {key: value for key, value in item.items() if value is not None}


HEADERS_BAD: list[tuple[Any, str]] = [
    ({}, "bad_header"),
    ({"inputs": []}, "bad_header"),
    ({"inputs": {"name": "event"}}, "bad_header"),
    ({"inputs": [1]}, "bad_header"),
    ([], "bad_json"),
    ({"inputs": [event_input()], "more": 1}, "unknown_field"),
    ({"inputs": [event_input(name="events")]}, "unknown_field"),
    ({"inputs": [event_input(name=["event"])]}, "unknown_field"),
    ({"inputs": [event_input(more=1)]}, "unknown_field"),
    ({"inputs": [event_input(), event_input()]}, "duplicate"),
    ({"inputs": [event_input(name="target")]}, "missing"),
    ({"inputs": [event_input(data=None)]}, "missing"),
    ({"inputs": [event_input(datatype="FP64")]}, "dtype"),
    ({"inputs": [event_input(datatype="BYTES")]}, "dtype"),
    ({"inputs": [event_input(datatype=None)]}, "dtype"),
    ({"inputs": [event_input(datatype=7)]}, "dtype"),
    ({"inputs": [event_input(datatype="UINT8", data=[256.0] * WIDTH)]}, "dtype"),
    ({"inputs": [event_input(shape=[1, -WIDTH])]}, "width"),
    ({"inputs": [event_input(shape=[-1, WIDTH])]}, "shape"),
    ({"inputs": [event_input(shape=[2**60, WIDTH])]}, "batch_limit"),
    ({"inputs": [event_input(shape=[10**400, 10**400])]}, "width"),
    ({"inputs": [event_input(shape=[WIDTH])]}, "shape"),
    ({"inputs": [event_input(shape=[1, 1, WIDTH])]}, "shape"),
    ({"inputs": [event_input(shape=[1.0, WIDTH])]}, "shape"),
    ({"inputs": [event_input(shape=[True, WIDTH])]}, "shape"),
    ({"inputs": [event_input(shape=None)]}, "shape"),
    ({"inputs": [event_input(data=[0.5] * (WIDTH - 1))]}, "size_mismatch"),
    ({"inputs": [event_input(data=[[0.5] * (WIDTH - 1)])]}, "width"),
    ({"inputs": [event_input(data=[True] * WIDTH)]}, "dtype"),
    ({"inputs": [event_input(data=["0.5"] * WIDTH)]}, "dtype"),
    ({"inputs": [event_input(data=[10**400] * WIDTH)]}, "not_finite"),
    ({"inputs": [event_input(data=[1e39] * WIDTH)]}, "not_finite"),
    ({"inputs": [event_input(data="0.5")]}, "missing"),
    ({"inputs": [event_input(parameters=RAW)]}, "size_mismatch"),
    ({"inputs": [event_input(parameters={"binary_data_size": -4})]}, "size_mismatch"),
    ({"inputs": [event_input(parameters={"shared_memory_region": "x"})]}, "unknown_field"),
    ({"inputs": [event_input(parameters=3)]}, "bad_header"),
    ({"inputs": [event_input()], "outputs": [{"name": "aligned"}, {"name": "aligned"}]}, "duplicate"),
    ({"inputs": [event_input()], "outputs": [{"name": "logits"}]}, "unknown_field"),
    ({"inputs": [event_input()], "outputs": [{"name": "cos_sim"}]}, "missing"),
    (
        {"inputs": [event_input()], "outputs": [{"name": "aligned", "parameters": {"classification": 1}}]},
        "unknown_field",
    ),
    ({"inputs": [event_input()], "parameters": {"theta": "0.8"}}, "theta"),
    ({"inputs": [event_input()], "parameters": {"theta": False}}, "theta"),
    ({"inputs": [event_input()], "parameters": {"theta": 1.5}}, "theta"),
    ({"inputs": [event_input()], "parameters": {"tehta": 0.5}}, "unknown_field"),
    ({"inputs": [event_input()], "parameters": {"binary_data_output": 1}}, "parameter"),
    ({"inputs": [event_input()], "parameters": {"timeout": -1}}, "parameter"),
    ({"inputs": [event_input()], "id": 7}, "bad_header"),
    ({"inputs": [event_input()], "outputs": {}}, "bad_header"),
    ({"inputs": [event_input()], "outputs": ""}, "bad_header"),
]


@pytest.mark.parametrize(("header", "code"), HEADERS_BAD, ids=lambda value: str(value)[:60])
def test_a_malformed_header_is_refused(server: LocalServer, header: Any, code: str) -> None:
    status, problem = server.json("POST", INFER, header)
    assert 400 <= status < 500
    assert problem["code"] == code


def test_null_is_what_was_not_given(server: LocalServer) -> None:
    nulls = {"id": None, "parameters": None, "outputs": None}
    plain = server.json("POST", INFER, {"inputs": [event_input()]})
    assert plain[0] == 200
    assert server.json("POST", INFER, {"inputs": [event_input()], **nulls}) == plain
    item = {**event_input(), "parameters": {"binary_data_size": None}}
    asked = {"inputs": [item], "parameters": {"theta": None, "timeout": None, "binary_data_output": None}}
    assert server.json("POST", INFER, asked) == plain
    wanted = [{"name": "aligned", "parameters": None}]
    assert server.json("POST", INFER, {"inputs": [{**event_input(), "parameters": None}], "outputs": wanted}) == plain
    status, problem = server.json("POST", INFER, {"inputs": None})
    assert (status, problem["code"]) == (400, "bad_header")


def test_a_time_limit_beyond_any_number_of_the_machine_is_the_servers_own(server: LocalServer) -> None:
    for timeout in (10**400, 10**4000, 2**63):
        asked = {"inputs": [event_input()], "parameters": {"timeout": timeout}}
        assert server.json("POST", INFER, asked)[0] == 200


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "BF16"])
@pytest.mark.parametrize("name", ["event", "target"])
def test_pixels_of_0_to_255_sent_as_values_are_refused_with_the_range(
    server: LocalServer, name: str, datatype: str
) -> None:
    dtype = {"FP32": np.float32, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}[datatype]
    sent = {"event": EVENT.astype(dtype), "target": TARGET.astype(dtype)}
    sent[name] = np.round(sent[name].astype(np.float32) * 255).astype(dtype)
    sent[name][0, 0] = 255
    with pytest.raises(InferenceServerException) as caught:
        ask(server, [tensor(side, values, datatype) for side, values in sent.items()])
    text = str(caught.value)
    assert caught.value.status() == "422"
    assert f"'{name}' has values from 0 to 255, pixels of this model are values from 0 to 1" in text
    assert "divide by 255, or send UINT8" in text


def test_values_that_overshoot_are_taken_and_those_of_another_scale_are_not(server: LocalServer) -> None:
    for worst, status in ((1.0, 200), (1.2, 200), (-0.2, 200), (2.0, 422), (-1.0, 422), (-1e30, 422)):
        values = np.full((1, WIDTH), 0.5, np.float32)
        values[0, 3] = worst
        assert server.ask("POST", INFER, *binary_request(values))[0] == status, worst
    assert server.json("POST", "/v1/align", {"event": [[255.0] * WIDTH]})[1]["code"] == "range"


def test_json_in_front_of_tensors_has_the_limit_of_json(server: LocalServer) -> None:
    head = b" " * server.endpoint.max_json_bytes + GOOD[:AT]
    headers = {"Inference-Header-Content-Length": str(len(head))}
    status, problem = server.json("POST", INFER, head + GOOD[AT:], headers=headers)
    assert (status, problem["code"]) == (413, "too_large")


def test_openapi_describes_infer_and_what_it_describes_is_answered(server: LocalServer) -> None:
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"):
        operation = document["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
        assert {"200", "400", "404", "413", "422", "429", "504"} <= set(operation["responses"])
        assert "Inference-Header-Content-Length" in [each["name"] for each in operation["parameters"]]
    schemas = document["components"]["schemas"]
    outputs = [{"name": name, "parameters": {"binary_data": False}} for name in ("aligned", "cos_sim", "accepted")]
    parameters = {"theta": 0.5, "binary_data_output": False, "timeout": 9_000_000, "priority": 1}
    asked = {
        "id": "mine",
        "inputs": [event_input(), event_input(name="target", parameters={})],
        "outputs": outputs,
        "parameters": parameters,
    }
    assert set(asked) == set(schemas["InferRequestDocument"]["properties"])
    assert set(parameters) == set(schemas["InferParameters"]["properties"])
    request, response = (
        {**document, "$ref": f"#/components/schemas/{name}"}
        for name in ("InferRequestDocument", "InferResponseDocument")
    )
    jsonschema.validate(asked, request)
    jsonschema.validate(json.loads(GOOD[:AT]), request)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**asked, "unknown": 1}, request)
    status, answer = server.json("POST", INFER, asked)
    assert status == 200
    jsonschema.validate(answer, response)
    _, headers, data = server.ask("POST", INFER, GOOD, GOOD_HEADERS)
    head = data[: int(headers["inference-header-content-length"])]
    jsonschema.validate(json.loads(head), response)


GOOD, GOOD_HEADERS = binary_request(np.full((1, WIDTH), 0.5))
AT = int(GOOD_HEADERS["Inference-Header-Content-Length"])


@pytest.mark.parametrize(
    ("body", "length", "code"),
    [
        (GOOD[:-1], str(AT), "size_mismatch"),
        (GOOD + b"\0", str(AT), "size_mismatch"),
        (GOOD[:AT], str(AT), "size_mismatch"),
        (GOOD, "99999999999", "bad_header"),
        (GOOD, "999999999999999999999999", "bad_header"),
        (GOOD, "-1", "bad_header"),
        (GOOD, "0", "bad_header"),
        (GOOD, "1e3", "bad_header"),
        (GOOD, str(AT - 1), "bad_json"),
        (GOOD, str(AT + 1), "bad_json"),
        (GOOD, None, "bad_json"),
        (b"", str(AT), "bad_header"),
        (b"", None, "bad_json"),
        (b"[" * 250_000, None, "json_depth"),
        (b'{"a":' * 250_000, None, "json_depth"),
        (b'{"inputs": NaN}', None, "bad_json"),
        (b'{"id": "' + b"[" * 100 + b'"}', None, "bad_header"),
        (b"\xff\xfe{}", None, "bad_json"),
        (b'{"inputs": [' + b"1" * 10_000 + b"]}", None, "bad_json"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_bodies_are_refused(server: LocalServer, body: bytes, length: str | None, code: str) -> None:
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    status, problem = server.json("POST", INFER, body, headers=headers)
    assert (status, problem["code"]) == (400, code)
    assert server.ask("POST", INFER, GOOD, GOOD_HEADERS)[0] == 200


def test_the_members_of_a_gzip_body_are_read_as_one(server: LocalServer) -> None:
    headers = {**GOOD_HEADERS, "content-encoding": "gzip"}
    whole = server.ask("POST", INFER, GOOD, GOOD_HEADERS)
    for cut in (1, AT, len(GOOD) - 1):
        body = gzip.compress(GOOD[:cut]) + gzip.compress(GOOD[cut:])
        status, _, data = server.ask("POST", INFER, body, headers)
        assert (status, data) == (200, whole[2])


def test_damaged_compression_is_refused(server: LocalServer) -> None:
    packed = gzip.compress(GOOD)
    empty = gzip.compress(b"")
    for body in (packed[:-9], packed[:30], GOOD, packed + b"more", packed + packed[:-1], packed + 1024 * empty):
        status, problem = server.json("POST", INFER, body, headers={**GOOD_HEADERS, "content-encoding": "gzip"})
        assert (status, problem["code"]) == (400, "encoding")
    status, problem = server.json("POST", INFER, GOOD, headers={**GOOD_HEADERS, "content-encoding": "br"})
    assert (status, problem["code"]) == (415, "encoding")


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v1/model", "/openapi.json"])
def test_head_is_get_without_a_body(server: LocalServer, path: str) -> None:
    status, headers, data = server.ask("HEAD", path)
    assert (status, data) == (200, b"")
    assert int(headers["content-length"]) > 0
    assert server.ask("HEAD", "/v1/align")[0] == 405


def test_the_version_in_service_answers_and_no_other(server: LocalServer) -> None:
    path = INFER.replace("/infer", "/versions/{}/infer")
    version = server.endpoint.model.version
    status, headers, data = server.ask("POST", path.format(version), GOOD, GOOD_HEADERS)
    assert (status, headers["x-model-version"]) == (200, version)
    assert data == server.ask("POST", INFER, GOOD, GOOD_HEADERS)[2]
    status, problem = server.json("POST", path.format("another"), GOOD, headers=GOOD_HEADERS)
    assert (status, problem["code"]) == (404, "not_found")
    client = triton.InferenceServerClient(server.url)
    event = triton.InferInput("event", [1, WIDTH], "FP32")
    event.set_data_from_numpy(np.full((1, WIDTH), 0.5, np.float32))
    assert client.infer("alignment-adapter", [event], version).get_response()["model_version"] == version
    client.close()


def test_an_unknown_path_or_method_is_a_problem_too(server: LocalServer) -> None:
    assert server.json("GET", "/v3")[1]["code"] == "not_found"
    assert server.json("GET", "/v2/models/another")[1]["code"] == "not_found"
    assert server.json("GET", "/v2/models/alignment-adapter/versions/none")[1]["code"] == "not_found"
    status, problem = server.json("DELETE", "/v1/model")
    assert (status, problem["code"]) == (405, "method")
    assert server.ask("POST", "/v2/repository/index", b"{}")[0] == 404


def test_a_body_in_many_small_chunks_is_read(server: LocalServer) -> None:
    status = []

    def slow() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        pieces = (GOOD[i : i + 7] for i in range(0, len(GOOD), 7))
        connection.request("POST", INFER, pieces, GOOD_HEADERS, encode_chunked=True)
        status.append(connection.getresponse().status)
        connection.close()

    thread = threading.Thread(target=slow)
    thread.start()
    thread.join(400)
    assert status == [200]


def json_request(data: list[list[float]], datatype: str, **more: Any) -> bytes:
    tensors = [
        {"name": name, "shape": [1, WIDTH], "datatype": datatype, "data": data[n]} for n, name in enumerate(NAMES)
    ]
    return json.dumps({"inputs": tensors, **more}).encode()


NAMES = ("event", "target")


def test_without_a_theta_a_pair_is_accepted_above_0_80(server: LocalServer, expected: Any) -> None:
    """Targets whose cosine with the aligned feature is 0.79, 0.81 and 0.84."""
    (aligned,) = expected(EVENT[:1]).astype(np.float64)
    unit = aligned / np.linalg.norm(aligned)
    rng = np.random.default_rng(0)
    for cosine, accepted in ((0.79, False), (0.81, True), (0.84, True)):
        across = rng.standard_normal(WIDTH)
        across -= (across @ unit) * unit
        target = cosine * unit + (1 - cosine**2) ** 0.5 * across / np.linalg.norm(across)
        inputs = [tensor("event", EVENT[:1], "FP32"), tensor("target", target[None].astype(np.float32), "FP32")]
        result = ask(server, inputs)
        assert result.as_numpy("cos_sim")[0] == pytest.approx(cosine, abs=1e-4)
        assert result.as_numpy("accepted").tolist() == [accepted]


@pytest.mark.parametrize("value", [0.5, 254.75, -1, 256])
def test_what_is_no_pixel_is_refused_as_uint8_and_not_cut(server: LocalServer, value: float) -> None:
    pixels = [[7] * WIDTH, [7] * WIDTH]
    assert server.ask("POST", INFER, json_request(pixels, "UINT8"))[0] == 200
    pixels[0] = [*[7] * (WIDTH - 1), value]
    status, problem = server.json("POST", INFER, json_request(pixels, "UINT8"))
    assert status in (400, 422)
    assert "event" in problem["detail"]


def test_pixels_are_refused_where_features_are_no_pixels() -> None:
    with pytest.raises(ApiError, match="'event' features of this model are float32, not pixels; send FP32"):
        check_datatype("UINT8", FeatureSpec(dtype="float32", shape=(WIDTH,), scale=1.0), "event")
