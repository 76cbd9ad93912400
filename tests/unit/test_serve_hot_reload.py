"""A new model takes over only if it is what was registered and answers as it did; otherwise the old one stays.

The registry is a real one.
"""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import INFER, WIDTH, LocalServer, binary_request, local_server, make_checkpoint, wait_for
from mlflow import MlflowClient

from ray_app.store.atomic import CHECKSUMS_FILE, sha256_bytes, sha256_file, verify_folder
from serve.http.routes import require_answers
from serve.model.hot_reload import ReloadResult, same_model
from serve.model.loaded_model import Identity
from serve.protocol.errors import ApiError

MODEL = "alignment-adapter"
BODY, HEADERS = binary_request(np.full((2, WIDTH), 0.5))


class Registry:
    """A database with a model whose champion moves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment(
            "alignment", artifact_location=(folder / "artifacts").as_uri()
        )
        self.client.create_registered_model(MODEL)

    def register(self, checkpoint: Path, **tags: str) -> str:
        """A version with these files, and champion now."""
        run = self.client.create_run(self.experiment)
        self.client.log_artifacts(run.info.run_id, str(checkpoint), "checkpoint")
        tags = {"checkpoint_sha256": verify_folder(checkpoint), **tags}
        source = f"runs:/{run.info.run_id}/checkpoint"
        version = str(self.client.create_model_version(MODEL, source, run.info.run_id, tags=tags).version)
        self.client.set_registered_model_alias(MODEL, "champion", version)
        return version

    def files(self, version: str) -> Path:
        """Where a version's files lie."""
        run_id = self.client.get_model_version(MODEL, version).run_id
        return self.folder / "artifacts" / run_id / "artifacts" / "checkpoint"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    made = Registry(tmp_path_factory.mktemp("registry"))
    made.register(make_checkpoint(made.folder / "first"), evaluation=json.dumps(EVALUATION))
    return made


@pytest.fixture(scope="module")
def server(registry: Registry) -> Iterator[LocalServer]:
    with local_server(f"models:/{MODEL}@champion", tracking_uri=registry.uri, reload_interval_s=3600.0) as it:
        yield it


EVALUATION = {
    "pairs": 10,
    "cosine_accept_rate": {"0.80": 0.5, "0.90": 0.25},
    "percentiles": {"P10": 0.5, "P50": 0.7, "P90": 0.9},
    "baselines": {"white": {"cos_sim_mean": 0.4, "cosine_accept_rate": {"0.80": 0.125, "0.90": 0.0}}},
}


def test_a_version_of_another_digest_is_another_model() -> None:
    first = Identity("1", "a" * 64, "models:/it@champion")
    assert same_model(first, replace(first, source="models:/it/1"))
    assert not same_model(first, replace(first, digest="b" * 64))
    assert not same_model(first, replace(first, version="2"))


def test_the_first_champion_is_served_with_what_promotion_noted(server: LocalServer) -> None:
    about = server.json("GET", "/v1/model")[1]
    assert (about["version"], about["source"]) == ("1", f"models:/{MODEL}@champion")
    assert about["metrics"]["test"] == EVALUATION
    assert about["acceptance_curve"] == {
        "part": "test",
        "theta": [0.8, 0.9],
        "adapter": [0.5, 0.25],
        "baselines": {"white": [0.125, 0.0]},
    }


def test_a_good_champion_takes_over(server: LocalServer, registry: Registry) -> None:
    before = server.ask("POST", INFER, BODY, HEADERS)[2]
    version = registry.register(make_checkpoint(registry.folder / "second", seed=1))
    since = server.endpoint.reloader.since
    assert server.json("POST", "/v1/reload")[1]["action"] == "swapped"
    assert server.endpoint.reloader.since > since, "serving since the exchange, not since the start"
    status, headers, after = server.ask("POST", INFER, BODY, HEADERS)
    assert (status, headers["x-model-version"]) == (200, version)
    assert headers["x-model-digest"] == verify_folder(registry.folder / "second")
    assert before != after
    assert server.json("POST", "/v1/reload")[1]["action"] == "unchanged"
    assert server.metric("align_model_info", version=version) == 1
    assert server.metric("align_model_info") == 1, "only one is in service"


@pytest.mark.parametrize(
    ("others", "status", "code", "words"),
    [
        (
            [RuntimeError("no room for it")],
            503,
            "replica_failed",
            "1 of 2 replicas did not answer: RuntimeError: no",
        ),
        ([TimeoutError(), KeyError("x")], 503, "replica_failed", "2 of 3 replicas did not answer: TimeoutError"),
        ([ReloadResult("refused", "version 9: it is damaged")], 409, "refused", "version 9: it is damaged"),
        ([ReloadResult("unreachable", "it is away: no route")], 503, "unreachable", "it is away: no route"),
    ],
)
def test_a_reload_that_failed_on_another_replica_is_an_error_with_its_cause(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch, others: list[Any], status: int, code: str, words: str
) -> None:
    """The replica that was asked is well, and knows of no cause itself."""
    monkeypatch.setattr(server, "others", others)
    answered, problem = server.json("POST", "/v1/reload")
    assert (answered, problem["code"]) == (status, code)
    assert words in problem["detail"]


def test_numbers_are_of_the_replicas_that_answer(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "others", [TimeoutError()])
    assert server.json("GET", "/v1/stats")[1]["replicas"] == 1
    assert server.ask("GET", "/metrics")[0] == 200
    with pytest.raises(ApiError, match="2 of 2 replicas did not answer"):
        require_answers([TimeoutError(), TimeoutError()])


def flipped(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (folder / "model.safetensors").write_bytes(bytes(data))


def consistent(folder: Path, file: str, data: bytes) -> None:
    """Another content with sums that hold: what a thorough forger leaves."""
    sums = (folder / "MANIFEST.sha256").read_text()
    sums = sums.replace(sha256_bytes((folder / file).read_bytes()), sha256_bytes(data))
    (folder / file).write_bytes(data)
    (folder / "MANIFEST.sha256").write_text(sums)


def forged(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-3] ^= 4
    consistent(folder, "model.safetensors", bytes(data))


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])


def missing(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [flipped, forged, truncated, missing], ids=lambda f: f.__name__)
def test_a_bad_champion_is_refused_and_reported_and_the_old_one_stays(
    server: LocalServer, registry: Registry, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    served = server.json("GET", "/v1/model")[1]["version"]
    version = registry.register(make_checkpoint(tmp_path / "bad", seed=7))
    damage(registry.files(version))
    status, problem = server.json("POST", "/v1/reload")
    assert (status, problem["code"]) == (409, "refused")
    about = server.json("GET", "/v1/model")[1]
    assert about["version"] == served
    assert about["refused"]["version"] == version
    assert about["refused"]["reason"] in problem["detail"]
    assert server.ask("POST", INFER, BODY, HEADERS)[1]["x-model-version"] == served
    assert server.ask("GET", "/v2/health/ready")[0] == 200
    assert asyncio.run(server.endpoint.reloader.check()) == "unchanged", "the watch does not try it again and again"


def test_a_refused_version_is_tried_again_when_someone_asks_for_it(
    server: LocalServer, registry: Registry, tmp_path: Path
) -> None:
    version = registry.register(make_checkpoint(tmp_path / "repaired", seed=70))
    weights = registry.files(version) / "model.safetensors"
    whole = weights.read_bytes()
    flipped(registry.files(version))
    assert server.json("POST", "/v1/reload")[0] == 409
    weights.write_bytes(whole)
    assert asyncio.run(server.endpoint.reloader.check()) == "unchanged"
    status, answer = server.json("POST", "/v1/reload")
    assert (status, answer["action"]) == (200, "swapped")
    about = server.json("GET", "/v1/model")[1]
    assert not about["refused"]
    assert about["version"] == version


def test_weights_that_answer_otherwise_are_refused(server: LocalServer, registry: Registry, tmp_path: Path) -> None:
    """Sums and digest hold, golden answers do not: saved so, not damaged on the way."""
    bad = make_checkpoint(tmp_path / "bad", seed=8)
    other = make_checkpoint(tmp_path / "other", seed=9)
    consistent(bad, "model.safetensors", (other / "model.safetensors").read_bytes())
    registry.register(bad)
    status, problem = server.json("POST", "/v1/reload")
    assert status == 409
    assert "golden row" in problem["detail"]


def test_a_model_for_other_features_is_refused(server: LocalServer, registry: Registry, tmp_path: Path) -> None:
    registry.register(make_checkpoint(tmp_path / "wide", shape=(3, 8, 8)))
    status, problem = server.json("POST", "/v1/reload")
    assert status == 409
    assert "start another endpoint" in problem["detail"]


def test_a_version_without_a_digest_is_refused(server: LocalServer, registry: Registry, tmp_path: Path) -> None:
    version = registry.register(make_checkpoint(tmp_path / "bare", seed=3))
    registry.client.delete_model_version_tag(MODEL, version, "checkpoint_sha256")
    assert server.json("POST", "/v1/reload")[1]["code"] == "refused"


@pytest.mark.parametrize(
    "evaluation",
    [
        "{not json",
        "[1]",
        '{"cosine_accept_rate": {"0.80": NaN}}',
        '{"cosine_accept_rate": {"0.80": 0.5}, "baselines": {"white": {}}}',
        '{"percentiles": {"median": 0.5}}',
        '{"percentiles": {"P50": null}}',
    ],
)
def test_a_version_whose_evaluation_cannot_be_read_is_refused(
    server: LocalServer, registry: Registry, tmp_path: Path, evaluation: str
) -> None:
    served = server.json("GET", "/v1/model")[1]["version"]
    registry.register(make_checkpoint(tmp_path / "mute", seed=4), evaluation=evaluation)
    status, problem = server.json("POST", "/v1/reload")
    assert (status, problem["code"]) == (409, "refused")
    assert "its evaluation cannot be read" in problem["detail"]
    status, about = server.json("GET", "/v1/model")
    assert (status, about["version"]) == (200, served)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"[]"),
        ("config.json", b"[" * 10**5),
        ("metrics.json", b"[]"),
        ("metrics.json", b'{"val": {"percentiles": {"P5": "nan"}}}'),
        ("metrics.json", b'{"val": {"cosine_accept_rate": {"0.80": 1e999}}}'),
        ("metrics.json", b'{"val": {"\\ud800": 1}}'),
        ("provenance.json", b"[]"),
        ("provenance.json", b'{"run": NaN}'),
        ("provenance.json", b'{"run": "\\ud800"}'),
        ("provenance.json", b'{"dataset_fingerprint": [[[]]]}'),
        ("model.safetensors", b"\xff" * 64),
    ],
)
def test_a_checkpoint_whose_sums_hold_and_whose_documents_do_not_never_takes_over(
    server: LocalServer, registry: Registry, tmp_path: Path, name: str, data: bytes
) -> None:
    folder = make_checkpoint(tmp_path / "next", seed=9)
    (folder / name).write_bytes(data)
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS_FILE)
    (folder / CHECKSUMS_FILE).write_text("".join(f"{sha256_file(folder / file)}  {file}\n" for file in names))
    before = server.json("GET", "/v1/model")[1]["digest"]
    registry.register(folder)
    assert server.json("POST", "/v1/reload")[0] == 409
    status, about = server.json("GET", "/v1/model")
    assert (status, about["digest"]) == (200, before)
    assert about["refused"]["reason"]
    assert server.ask("POST", INFER, BODY, HEADERS)[0] == 200


def test_the_watch_continues_after_a_bad_tag_and_after_a_defect(registry: Registry, tmp_path: Path) -> None:
    """The champion after them is taken."""
    registry.register(make_checkpoint(tmp_path / "first", seed=50))
    with local_server(f"models:/{MODEL}@champion", tracking_uri=registry.uri, reload_interval_s=0.05) as server:
        bad = registry.register(make_checkpoint(tmp_path / "bad", seed=51), evaluation="{not json")
        wait_for(lambda: server.json("GET", "/v1/model")[1]["refused"])
        assert server.json("GET", "/v1/model")[1]["refused"]["version"] == bad
        whole = server.endpoint.reloader.source.current
        server.endpoint.reloader.source.current = lambda: 1 // 0  # type: ignore[method-assign]
        wait_for(lambda: server.metric("align_reloads_total", outcome="failed") > 1)
        assert "ZeroDivisionError" in server.json("GET", "/v1/model")[1]["watch"]["last_error"]
        server.endpoint.reloader.source.current = whole  # type: ignore[method-assign]
        good = registry.register(make_checkpoint(tmp_path / "good", seed=52))
        wait_for(lambda: server.endpoint.model.version == good)
        assert server.json("GET", "/v1/model")[1]["watch"]["failures"] == 0


def test_an_outage_of_the_registry_changes_nothing(server: LocalServer, registry: Registry) -> None:
    def rename(old: str, new: str) -> None:
        with closing(sqlite3.connect(registry.folder / "mlflow.db")) as database:
            database.execute(f"ALTER TABLE {old} RENAME TO {new}")

    rename("registered_model_aliases", "away")
    try:
        status, problem = server.json("POST", "/v1/reload")
        assert (status, problem["code"]) == (503, "unreachable")
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert server.ask("POST", INFER, BODY, HEADERS)[0] == 200
        assert server.json("GET", "/v1/model")[1]["watch"]["failures"] == 1
        assert server.metric("align_reloads_total", outcome="unreachable") == 1
    finally:
        rename("away", "registered_model_aliases")


def test_callers_never_see_an_exchange(server: LocalServer, registry: Registry, tmp_path: Path) -> None:
    """Six callers without a pause; good and bad champions come; every answer is 200 and of one model throughout."""
    made = [make_checkpoint(tmp_path / f"{seed}", seed=seed) for seed in range(20, 26)]
    answers: dict[str, set[bytes]] = {}
    codes: list[int] = []
    stop = threading.Event()

    def caller() -> None:
        while not stop.is_set():
            status, headers, data = server.ask("POST", INFER, BODY, HEADERS)
            codes.append(status)
            answers.setdefault(headers["x-model-version"], set()).add(data)

    callers = [threading.Thread(target=caller) for _ in range(6)]
    for thread in callers:
        thread.start()
    outcomes = []
    for number, checkpoint in enumerate(made):
        version = registry.register(checkpoint)
        if number % 3 == 2:
            flipped(registry.files(version))
        outcomes.append(server.json("POST", "/v1/reload")[0])
    stop.set()
    for thread in callers:
        thread.join()
    assert outcomes == [200, 200, 409, 200, 200, 409]
    assert set(codes) == {200}
    assert len(answers) == 5
    assert all(len(bodies) == 1 for bodies in answers.values()), "no answer mixes two models"


def test_the_watch_finds_a_new_champion_by_itself(registry: Registry, tmp_path: Path) -> None:
    with local_server(f"models:/{MODEL}/1", tracking_uri=registry.uri, reload_interval_s=0.05) as pinned:
        assert pinned.json("GET", "/v1/model")[1]["version"] == "1"
    folder = make_checkpoint(tmp_path / "folder", seed=40)
    with local_server(folder, reload_interval_s=0.05) as server:
        first = server.endpoint.model.version
        make_checkpoint(tmp_path / "next", seed=41)
        folder.rename(tmp_path / "old")
        (tmp_path / "next").rename(folder)
        waited = threading.Event()
        for _ in range(100):
            if server.endpoint.model.version != first:
                break
            waited.wait(0.05)
        assert server.endpoint.model.version == verify_folder(folder)[:12]
        assert server.ask("POST", INFER, BODY, HEADERS)[1]["x-model-version"] != first
