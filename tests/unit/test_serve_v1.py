"""`/v1`: every form of an input says the same, recordings are drawn by our own code, and nothing sent is ever run."""

import base64
import io
import json
import os
import pickle
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from endpoints import SHAPE, WIDTH, LocalServer, local_server, make_checkpoint
from openapi_spec_validator import validate
from PIL import Image
from recordings import read_events

from ray_app.events.render import equal_counts, event_image
from serve.http.request import ROUTES, TEMPLATES
from serve.protocol.errors import ApiError
from serve.protocol.inputs import parse_request
from serve.protocol.schemas import AlignRequest

README = Path(__file__).parents[2] / "README.md"
RNG = np.random.default_rng(1)
PIXELS = RNG.integers(0, 256, (2, WIDTH), dtype=np.uint8)
TARGET = RNG.integers(1, 256, (2, WIDTH), dtype=np.uint8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    metrics = {"val": {"cosine_accept_rate": {"0.70": 0.5, "0.80": 0.25}, "cos_sim_mean": 0.7}}
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("v1") / "checkpoint", metrics=metrics)
    with local_server(checkpoint, max_batch=8, max_queue=64) as it:
        yield it


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def raw(values: Any, datatype: str) -> dict[str, Any]:
    return {"data": b64(values.tobytes()), "datatype": datatype, "shape": list(values.shape)}


def png(image_HWC: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG")
    return out.getvalue()


def image_of(row: Any) -> Any:
    return row.reshape(SHAPE).transpose(1, 2, 0)


def values_of(pair: dict[str, Any]) -> Any:
    return np.frombuffer(base64.b64decode(pair["aligned"]["data"]), "<f4")


def test_numbers_raw_numbers_and_pictures_of_one_image_get_one_answer(server: LocalServer) -> None:
    value = (PIXELS / np.float32(255)).astype(np.float32)
    forms: list[Any] = [
        value[:1].tolist(),
        raw(PIXELS[:1], "UINT8"),
        raw(value[:1], "FP32"),
        {"png": b64(png(image_of(PIXELS[0])))},
    ]
    answers = [server.json("POST", "/v1/align", {"event": form, "encoding": "base64"}) for form in forms]
    assert [status for status, _ in answers] == [200] * 4
    rows = [values_of(answer["pairs"][0]) for _, answer in answers]
    for row in rows[1:]:
        np.testing.assert_allclose(row, rows[0], rtol=1e-5, atol=1e-5)
    plain = server.json("POST", "/v1/align", {"event": forms[0], "id": "mine"})[1]
    np.testing.assert_allclose(plain["pairs"][0]["aligned"], rows[0], rtol=1e-5, atol=1e-5)
    assert plain["id"] == "mine"
    assert plain["model"]["digest"] == server.endpoint.model.identity.digest


def test_verify_gives_verdicts_and_ships_no_features(server: LocalServer) -> None:
    request = {"event": raw(PIXELS, "UINT8"), "target": raw(TARGET, "UINT8"), "theta": 0.5}
    status, answer = server.json("POST", "/v1/verify", request)
    assert status == 200
    assert answer["theta"] == 0.5
    with torch.no_grad():
        aligned = server.endpoint.model.adapter(torch.from_numpy(PIXELS).float() / 255).double().numpy()
    for i, pair in enumerate(answer["pairs"]):
        target = TARGET[i].astype(np.float64)
        cosine = aligned[i] @ target / np.linalg.norm(aligned[i]) / np.linalg.norm(target)
        before = PIXELS[i] @ target / np.linalg.norm(PIXELS[i].astype(float)) / np.linalg.norm(target)
        assert pair == {
            "cos_sim": pytest.approx(cosine, abs=1e-5),
            "accepted": bool(cosine > 0.5),
            "before": pytest.approx(before, abs=1e-5),
        }
    status, problem = server.json("POST", "/v1/verify", {"event": raw(PIXELS, "UINT8")})
    assert (status, problem["detail"]) == (422, "target: Field required.")


def test_pictures_come_back_as_they_went_in(server: LocalServer) -> None:
    request = {
        "event": raw(PIXELS, "UINT8"),
        "target": raw(TARGET, "UINT8"),
        "return": ["event_image", "target_image", "aligned_image", "aligned"],
        "encoding": "png",
    }
    pairs = server.json("POST", "/v1/align", request)[1]["pairs"]
    for i, pair in enumerate(pairs):
        for name, sent in (("event_image", PIXELS[i]), ("target_image", TARGET[i])):
            seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(pair[name]))))
            np.testing.assert_array_equal(seen, image_of(sent))
        assert pair["aligned"] == pair["aligned_image"]
        aligned = server.endpoint.model.adapter(torch.from_numpy(PIXELS[i : i + 1]).float() / 255)[0]
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(pair["aligned_image"]))))
        np.testing.assert_allclose(seen, image_of(aligned.clamp(0, 1).numpy() * 255), atol=0.51)


def test_pictures_are_taken_as_a_viewer_shows_them(server: LocalServer) -> None:
    """Turned by EXIF, 16 bits by their high byte, transparency over white; other formats reach no decoder."""
    image, turned, exif = image_of(PIXELS[0]), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(image))).save(turned, "PNG", exif=exif)
    grey = np.repeat(image[..., :1], 3, axis=2)
    deep, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray((image[..., 0].astype(np.uint16) << 8) + 7).save(deep, "PNG")
    Image.fromarray(np.dstack([image, np.zeros(image.shape[:2], np.uint8)])).save(clear, "WEBP", lossless=True)
    for sent, right in ((turned, image), (deep, grey), (clear, np.full_like(image, 255))):
        request = {"event": {"png": b64(sent.getvalue())}, "return": ["event_image"]}
        status, answer = server.json("POST", "/v1/align", request)
        assert status == 200, answer
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["pairs"][0]["event_image"]))))
        np.testing.assert_array_equal(seen, right)
    for kind in ("GIF", "PDF", "TIFF"):
        out = io.BytesIO()
        Image.fromarray(image).save(out, kind)
        status, problem = server.json("POST", "/v1/align", {"event": {"png": b64(out.getvalue())}})
        assert (status, problem["code"]) == (422, "image")
        assert "none of PNG, JPEG, WEBP" in problem["detail"]


def recording(**changes: Any) -> bytes:
    n = 400
    columns: dict[str, Any] = {
        "x": RNG.integers(0, 64, n).astype(np.uint16),
        "y": RNG.integers(0, 48, n).astype(np.uint16),
        "t": np.arange(n, dtype=np.int64),
        "p": RNG.integers(0, 2, n).astype(np.uint8),
        **changes,
    }
    out = io.BytesIO()
    np.save(out, np.array(columns, dtype=object), allow_pickle=True)
    return out.getvalue()


def test_a_recording_is_drawn_as_prepare_draws_it(server: LocalServer, tmp_path: Path) -> None:
    data = recording()
    (tmp_path / "r.npy").write_bytes(data)
    events = read_events(tmp_path / "r.npy", 64, 48)
    for part, drawn in (("middle", event_image(equal_counts(events, 5)[2])), ("all", event_image(events))):
        event = {"recording": b64(data), "width": 64, "height": 48, "part": part}
        status, answer = server.json("POST", "/v1/align", {"event": event, "return": ["event_image"]})
        assert status == 200
        expected = Image.fromarray(drawn).resize(SHAPE[1:], Image.Resampling.BILINEAR)
        seen = Image.open(io.BytesIO(base64.b64decode(answer["pairs"][0]["event_image"])))
        np.testing.assert_array_equal(np.asarray(seen), np.asarray(expected))


def test_a_real_recording_is_taken_as_bare_bytes(server: LocalServer, shared_data: Path) -> None:
    data = (shared_data / "events" / "000069.npy").read_bytes()
    headers = {"content-type": "application/octet-stream"}
    path = "/v1/align?return=event_image,aligned&encoding=base64&id=r"
    status, answer = server.json("POST", path, data, headers=headers)
    assert (status, answer["id"]) == (200, "r")
    image = base64.b64decode(answer["pairs"][0]["event_image"])
    status, again = server.json("POST", "/v1/align?encoding=base64", image, headers={"content-type": "image/png"})
    assert status == 200
    np.testing.assert_allclose(values_of(again["pairs"][0]), values_of(answer["pairs"][0]), atol=1e-6)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_not_run(server: LocalServer, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for data in (recording(x=Evil(str(marker))), pickle.dumps(Evil(str(marker)))):
        event = {"recording": b64(data), "width": 64, "height": 48}
        status, problem = server.json("POST", "/v1/align", {"event": event})
        assert (status, problem["code"]) == (422, "recording")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(str(marker))))
    assert marker.exists(), "the trap itself works"


def claimed(count: int) -> Any:
    """An array that claims more than its pickle holds."""
    return np.broadcast_to(np.uint16(1), (count,))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "field"),
        ({"event": None}, "field"),
        ({"event": []}, "field"),
        ({"event": [[]]}, "width"),
        ({"event": [[0.5] * (WIDTH + 1)]}, "width"),
        ({"event": [[0.5] * WIDTH] * 9}, "batch_limit"),
        ({"event": [[0.0] * WIDTH]}, "zero_norm"),
        ({"event": [[1e39] * WIDTH]}, "not_finite"),
        ({"event": [[True] * WIDTH]}, "dtype"),
        ({"event": [["1"] * WIDTH]}, "dtype"),
        ({"event": [[None] * WIDTH]}, "dtype"),
        ({"event": [[10**400] * WIDTH]}, "not_finite"),
        ({"event": {"png": "no base64!"}}, "base64"),
        ({"event": {"png": b64(b"no image")}}, "image"),
        ({"event": {"png": b64(png(image_of(PIXELS[0]))[:80])}}, "image"),
        ({"event": {"png": ""}}, "image"),
        ({"event": {"recording": ""}}, "recording"),
        ({"event": {"recording": b64(b"no npy")}}, "recording"),
        ({"event": {"recording": b64(recording()[:200])}}, "recording"),
        ({"event": {"recording": b64(recording(x=np.full(400, 9999, np.uint16)))}}, "recording"),
        ({"event": {"recording": b64(recording(t=np.arange(400)[::-1].copy()))}}, "recording"),
        ({"event": {"recording": b64(recording(x=[1] * 400))}}, "recording"),
        ({"event": {"recording": b64(recording()), "width": 0}}, "field"),
        ({"event": {"recording": b64(recording()), "width": 10**9}}, "field"),
        ({"event": {"data": "", "datatype": "FP64", "shape": [1, WIDTH]}}, "field"),
        ({"event": {"data": "", "datatype": "FP32", "shape": [-1, WIDTH]}}, "shape"),
        ({"event": {"data": "", "datatype": "FP32", "shape": [2**62, 2**62]}}, "width"),
        ({"event": {"data": ""}}, "field"),
        ({"event": raw(PIXELS, "UINT8"), "target": raw(TARGET[:1], "UINT8")}, "shape"),
        ({"event": raw(PIXELS, "UINT8"), "theta": 2}, "theta"),
        ({"event": raw(PIXELS, "UINT8"), "theta": False}, "theta"),
        ({"event": raw(PIXELS, "UINT8"), "thet": 0.5}, "unknown_field"),
        ({"event": raw(PIXELS, "UINT8"), "return": ["logits"]}, "field"),
        ({"event": raw(PIXELS, "UINT8"), "return": ["target_image"]}, "missing"),
        ({"event": raw(PIXELS, "UINT8"), "encoding": "pickle"}, "field"),
        ({"event": raw(PIXELS, "UINT8"), "id": 7}, "field"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_answered_is_refused(server: LocalServer, body: Any, code: str) -> None:
    status, problem = server.json("POST", "/v1/align", body)
    assert (status, problem["code"]) == (422, code)


def test_null_is_what_was_not_given(server: LocalServer) -> None:
    plain = server.json("POST", "/v1/align", {"event": raw(PIXELS, "UINT8"), "id": "1"})
    nulls = dict.fromkeys(("target", "theta", "return", "encoding"))
    event = {**raw(PIXELS, "UINT8"), "png": None, "recording": None}
    assert plain[0] == 200
    assert server.json("POST", "/v1/align", {"event": event, "id": "1", **nulls}) == plain
    assert server.json("POST", "/v1/verify", {"event": event, "target": None})[1]["code"] == "field"


@pytest.mark.parametrize(
    "body",
    [
        b'{"event":[' + b"0," * 200_000 + b"0]}",
        b'{"event":[[0]],"return":[' + b"0," * 200_000 + b"0]}",
        b'{"event":{"data":"","datatype":"FP32","shape":[' + b'"",' * 200_000 + b"0]}}",
        json.dumps({"event": [[0.5]], **dict.fromkeys(map(str, range(50_000)), 0)}).encode(),
        json.dumps({"event": dict.fromkeys(map(str, range(50_000)), 0)}).encode(),
        b'{"' + b"k" * 400_000 + b'": 0}',
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_request_that_is_wrong_in_many_places_costs_one_error(body: bytes) -> None:
    """Each of 200,000 errors took 3 kB, in all more than the replica had."""
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            parse_request(memoryview(body), AlignRequest)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.status == 422
    assert len(caught.value.detail) < 500
    assert peak < 40 * len(body)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_picture_may_be_the_whole_body(server: LocalServer, kind: str) -> None:
    out = io.BytesIO()
    Image.fromarray(image_of(PIXELS[0])).save(out, kind)
    headers = {"content-type": f"image/{kind}"}
    assert server.json("POST", "/v1/align", out.getvalue(), headers=headers)[0] == 200


def test_other_types_of_body_are_refused(server: LocalServer) -> None:
    for path, content_type in (("/v1/align", "text/plain"), ("/v1/verify", "image/png")):
        status, problem = server.json("POST", path, b"{}", headers={"content-type": content_type})
        assert (status, problem["code"]) == (415, "content_type")
    status, problem = server.json("POST", "/v1/align?size=9", b"x", headers={"content-type": "image/png"})
    assert (status, problem["code"]) == (422, "unknown_field")


def test_the_model_describes_itself(server: LocalServer) -> None:
    status, about = server.json("GET", "/v1/model")
    assert status == 200
    assert about["dataset_fingerprint"] == "f" * 64
    assert about["adapter"]["strategy"] == "lightweight"
    curve = {"part": "val", "theta": [0.7, 0.8], "adapter": [0.5, 0.25], "without_baselines": True}
    assert about["acceptance_curve"] == curve
    assert about["metrics"]["val"]["without_baselines"]
    assert about["refused"] is None
    assert about["limits"]["max_batch"] == 8


def test_openapi_is_valid_and_names_every_route(server: LocalServer) -> None:
    document = json.loads(server.ask("GET", "/openapi.json")[2])
    validate(document)
    paths = set(document["paths"])
    assert {"/v1/align", "/v1/verify", "/v1/model", "/v1/reload", "/v1/stats", "/metrics", "/v2"} <= paths
    assert {path for path in ROUTES if path not in ("/", "/openapi.json")} <= paths
    assert {template for _, template in TEMPLATES} <= paths
    assert "AlignRequest" in document["components"]["schemas"]


def test_programs_of_the_pages_run(server: LocalServer) -> None:
    pages = README.read_text() + (README.parent / "docs" / "serving.md").read_text()
    programs = re.findall(r"```python\n(.*?)```", pages, re.DOTALL)
    programs = [text for text in programs if "127.0.0.1:8000" in text and not text.splitlines()[-1].startswith(" ")]
    assert len(programs) == 2
    for program in programs:
        text = program.replace("127.0.0.1:8000", server.url).replace("150_528", str(WIDTH))
        names: dict[str, Any] = {"pixels": np.tile(TARGET, (4, 1)), "frames": np.tile(PIXELS, (4, 1))}
        *body, last = text.rstrip().splitlines()
        exec("\n".join(body), names)
        answer = eval(last, names)
        assert len(answer if isinstance(answer, np.ndarray) else answer[0]) == 8
