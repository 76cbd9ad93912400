"""The endpoint encodes recordings and pictures as `prepare` did, and says which encoder it lacks."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders
import torch
from endpoints import LocalServer, local_server, make_checkpoint
from numpy.typing import NDArray
from PIL import Image

from ray_app.config.serve import EndpointConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.encoders.base import EncoderSettings, VisionModel
from ray_app.encoders.registry import load_encoder
from ray_app.errors import ConfigError, InputError
from ray_app.events.recording import Events
from ray_app.events.render import equal_counts, event_image
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features
from serve.app import require_registered_model
from serve.model.encoders import rows_within
from serve.model.loaded_model import ServedModel
from serve.model.predict import InferenceRequest, InferenceResult, predict
from serve.protocol.inputs import Pictures

SENSOR = {"width": 64, "height": 48}
RNG = np.random.default_rng(5)
X, Y, P = (RNG.integers(0, most, 500) for most in (64, 48, 2))
EVENTS = Events(X.astype(np.uint16), Y.astype(np.uint16), np.arange(500), P.astype(np.uint8), 64, 48)
FRAME = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)


def b64_png(image_HWC: NDArray[np.uint8]) -> str:
    out = io.BytesIO()
    Image.fromarray(image_HWC).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def recording() -> str:
    out = io.BytesIO()
    np.savez(out, x=EVENTS.x, y=EVENTS.y, t=np.arange(500), p=EVENTS.p)
    return base64.b64encode(out.getvalue()).decode()


def checkpoint_of(folder: Path, event: VisionModel, target: VisionModel) -> Path:
    """An adapter between the features of two encoders, with some weights that are not zero."""
    specs = Features(event=event.feature_spec("bf16"), target=target.feature_spec("bf16"))
    adapter = build_adapter(AdapterConfig("bottleneck", specs.event.width, specs.target.width, hidden_dim=8), 0)
    save_checkpoint(folder, adapter.eval(), metrics={}, provenance={}, features=specs)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a CLIP and an EventGPT, and adapters from either to the features of the CLIP."""
    root = tmp_path_factory.mktemp("encoded")
    tiny_encoders.save(root / "clip", "clip_vision")
    tiny_encoders.save_eventgpt(root / "eventgpt")
    clip = load_encoder(root / "clip", EncoderSettings(pool="mean"))
    eventgpt = load_encoder(root / "eventgpt", EncoderSettings(num_images=5))
    checkpoint_of(root / "one", clip, clip)
    checkpoint_of(root / "five", eventgpt, clip)
    return root


def with_encoders(root: Path, name: str) -> dict[str, Any]:
    return {"event_encoder": root / ("eventgpt" if name == "five" else "clip"), "target_encoder": root / "clip"}


def images_of(name: str) -> list[NDArray[np.uint8]]:
    """The pictures of the recording that `prepare` would encode."""
    drawn = [event_image(part) for part in equal_counts(EVENTS, 5)]
    return drawn if name == "five" else [drawn[2]]


def feature_of(encoder: VisionModel, images: list[NDArray[np.uint8]]) -> torch.Tensor:
    """What a store keeps of them."""
    return encoder.encode([images]).flatten(1).bfloat16().float()


@pytest.mark.parametrize("name", ["one", "five"])
def test_a_recording_is_drawn_encoded_and_aligned_as_in_training(root: Path, name: str) -> None:
    with local_server(root / name, **with_encoders(root, name)) as server:
        encoders, model = server.endpoint.encoders, server.endpoint.model
        event = feature_of(encoders["event"], images_of(name))
        target = feature_of(encoders["target"], [FRAME])
        with torch.no_grad():
            aligned = model.adapter(event)
        body = {"event": {"recording": recording(), **SENSOR}, "target": {"png": b64_png(FRAME)}}
        body |= {"return": ["aligned", "event_image", "target_image"]}
        status, headers, data = server.ask("POST", "/v1/align", body)
        assert status == 200, data
        (pair,) = server.json("POST", "/v1/align", body)[1]["pairs"]
        assert {"draw", "encode", "adapter", "total"} <= {
            part.split(";")[0] for part in headers["server-timing"].split(", ")
        }
        np.testing.assert_allclose(pair["aligned"], aligned[0], atol=1e-5)
        assert pair["cos_sim"] == pytest.approx(float(torch.cosine_similarity(aligned, target)), abs=1e-5)
        middle = images_of(name)[len(images_of(name)) // 2]
        for shown, sent, side in (("event_image", middle, "event"), ("target_image", FRAME, "target")):
            seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(pair[shown]))))
            np.testing.assert_array_equal(seen, encoders[side].preprocess.cut(sent))  # type: ignore[index]
        as_numbers = server.json("POST", "/v1/align", {"event": event.tolist()})[1]
        np.testing.assert_allclose(as_numbers["pairs"][0]["aligned"], pair["aligned"], atol=1e-5)
        about = server.json("GET", "/v1/model")[1]
        assert about["adapter"]["strategy"] == "bottleneck"
        assert {side: each["loaded"] for side, each in about["encoders"].items()} == {"event": True, "target": True}
        assert about["encoders"]["target"]["sha256"] == encoders["target"].sha256


def refused(server: LocalServer, body: dict[str, Any]) -> str:
    status, problem = server.json("POST", "/v1/align", body)
    assert status == 422
    return f"{problem['code']}: {problem['detail']}"


def test_without_its_folder_the_endpoint_says_what_is_missing_and_takes_features(root: Path) -> None:
    with local_server(root / "one", target_encoder=root / "clip") as server:
        for event in ({"recording": recording(), **SENSOR}, {"png": b64_png(FRAME)}):
            words = refused(server, {"event": event})
            assert words.startswith("encoder: 'event' features of this model come from CLIPVisionModel, layer -1")
            assert words.endswith("start it with --event-encoder DIR, or send features of 16 numbers.")
        body = {"event": np.ones((1, 16)).tolist(), "target": {"png": b64_png(FRAME)}}
        assert server.json("POST", "/v1/align", body)[0] == 200
        about = server.json("GET", "/v1/model")[1]
        assert {side: each["loaded"] for side, each in about["encoders"].items()} == {"event": False, "target": True}
        assert "'event' features of this model are not images" in refused(server, {**body, "return": ["event_image"]})


def test_one_picture_is_too_few_for_an_encoder_of_several(root: Path) -> None:
    with local_server(root / "five", **with_encoders(root, "five")) as server:
        words = refused(server, {"event": {"png": b64_png(FRAME)}})
        assert words == "image: the encoder of 'event' takes 5 pictures together; send a recording."


def test_pictures_of_several_requests_are_encoded_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_server(root / "one", **with_encoders(root, "one")) as server:
        model, encoders = server.endpoint.model, server.endpoint.encoders
    assert encoders["event"] is encoders["target"], "one folder, loaded once"
    batches: list[int] = []
    encode = VisionModel.encode_pixels

    def counted(self: VisionModel, pixels: NDArray[np.float32]) -> torch.Tensor:
        batches.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(VisionModel, "encode_pixels", counted)
    images = RNG.integers(0, 256, (3, 1, 3, tiny_encoders.SIDE, tiny_encoders.SIDE), dtype=np.uint8)
    numbers = torch.ones(1, 16)
    works = [
        InferenceRequest(Pictures(images[:2])),
        InferenceRequest(numbers),
        InferenceRequest(numbers, Pictures(images[:1])),
        InferenceRequest(Pictures(images[2:])),
    ]
    together = answers_of(model, works, encoders)
    assert batches == [3, 1], "events of the pass, then its targets"
    for work, found in zip(works, together, strict=True):
        (alone,) = answers_of(model, [work], encoders)
        torch.testing.assert_close(found.aligned_BD, alone.aligned_BD, atol=1e-5, rtol=0)
    assert together[2].cos_B is not None


def test_a_pass_holds_no_more_pairs_than_are_encoded_before_it_is_taken_for_stuck(root: Path) -> None:
    clip = load_encoder(root / "clip", EncoderSettings())
    assert rows_within(30.0, {}, 32) == 32
    for took, rows in ((0.001, 32), (2.0, 7), (50.0, 1)):
        clip.forward_s = took
        assert rows_within(30.0, {"event": clip, "target": clip}, 32) == rows


def answers_of(model: ServedModel, works: list[InferenceRequest], encoders: Any) -> list[InferenceResult]:
    answers = predict(model, works, encoders)
    assert all(isinstance(answer, InferenceResult) for answer in answers), answers
    return answers  # type: ignore[return-value]


def test_another_encoder_and_one_that_is_not_needed_are_refused_before_the_start(root: Path, tmp_path: Path) -> None:
    def start(checkpoint: Path, encoder: Path) -> None:
        require_registered_model(EndpointConfig(checkpoint=str(checkpoint), event_encoder=encoder))

    with pytest.raises(InputError, match=r"eventgpt is not the encoder that made these features"):
        start(root / "one", root / "eventgpt")
    changed = tiny_encoders.save(tmp_path / "clip", "clip_vision", resample=2)
    with pytest.raises(InputError, match=r"is not the encoder that made these features"):
        start(root / "one", changed)
    pixels = make_checkpoint(tmp_path / "pixels")
    with pytest.raises(ConfigError, match=r"the event features of .*pixels come from no encoder .* leave it out"):
        start(pixels, root / "clip")
    start(root / "one", root / "clip")
