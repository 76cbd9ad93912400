"""Sending an event log to MLflow: nothing is lost or stored twice, and a server that is away delays nothing."""

import http.server
import io
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from endpoints import make_checkpoint
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow_process import MlflowServer, free_port, missing_and_extra
from rich.console import Console

from ray_app import cli
from ray_app.cluster.env_defaults import set_defaults
from ray_app.commands.doctor import check_tracking
from ray_app.commands.sync import run_sync
from ray_app.commands.train import progress as train_progress
from ray_app.commands.train.progress import TrainingProgress
from ray_app.config.base import TrackingFlags
from ray_app.config.tune import SyncConfig
from ray_app.errors import ConfigError, RegistryError, StoreError
from ray_app.runs.event_log import EventLog, entries
from ray_app.tracking import mlflow_logger as tracking
from ray_app.tracking import tracker as tracker_module
from ray_app.tracking.mlflow_logger import (
    MLFLOW_SYNC,
    connect,
    experiment_id,
    failure_cause,
    is_away,
    pending_runs,
    sync_run,
    to_metrics,
)
from ray_app.tracking.model_registry import find_version
from ray_app.tracking.tracker import Tracker
from ray_app.tracking.uri import database_file, tracking_uri


def begin(log: EventLog, key: str = "k1") -> None:
    log.write(
        "run_started",
        name="a-run",
        key=key,
        experiment="alignment",
        params={"lr": 0.1},
        tags={"t": "x"},
        workers=1,
        time=1.0,
    )


def steps(log: EventLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.step(step, loss=1.0 / step, epoch=1, pairs=8 * step)


def end(log: EventLog, artifacts: str | None = None) -> None:
    log.write("run_ended", status="FINISHED", artifacts=artifacts, time=2.0)


def losses(uri: str, key: str = "k1") -> list[tuple[int, float]]:
    """(step, loss) of the one run of this key, as the server has them."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("alignment")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.run_key = '{key}'")
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]


def expected(last: int) -> list[tuple[int, float]]:
    return [(step, 1.0 / step) for step in range(1, last + 1)]


@pytest.fixture
def flags(tmp_path: Path) -> TrackingFlags:
    return TrackingFlags(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database that tests share, each with a run of its own key: to make one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    return tmp_path / "runs" / "one"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    served = MlflowServer(tmp_path)
    yield served
    served.kill()


@pytest.mark.slow
def test_a_server_that_is_killed_and_comes_back_gets_every_point_in_one_run(
    server: MlflowServer, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Away at the start, up, killed in the middle, up again: no write to the event log waits for it."""
    monkeypatch.setattr(tracker_module, "MAX_PAUSE_S", 0.5)
    slowest = 0.0
    with EventLog(run) as log:
        begin(log)
        tracker = Tracker(TrackingFlags(tracking_uri=server.uri), run)
        for first in (1, 401, 801):
            began = time.perf_counter()
            steps(log, first, first + 399)
            slowest = max(slowest, time.perf_counter() - began)
            if first == 1:
                server.start()
                deadline = time.monotonic() + 400
                while tracker.run_id is None and time.monotonic() < deadline:
                    time.sleep(0.1)
            elif first == 401:
                server.kill()
        time.sleep(1)
        server.start()
        end(log)
    assert tracker.close()
    assert slowest < 60, "400 lines were written without waiting for a server"
    assert losses(server.uri) == expected(1200)
    assert capsys.readouterr().err.count("does not answer") == 1
    assert sync_run(run, server.uri)["points_sent"] == 0
    (run / MLFLOW_SYNC).unlink()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a server that has the points compares each
    again = sync_run(run, server.uri)
    assert again["points_sent"] == 1200 * 3, "nothing is known of what the server has"
    assert missing_and_extra(run, server.uri, again["mlflow_run_id"]) == (0, 0)


def test_a_run_that_was_never_carried_over_is_brought_by_sync_and_a_second_sync_changes_nothing(
    flags: TrackingFlags, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(run / "ckpt")
    with EventLog(run) as log:
        begin(log)
        steps(log, 1, 1500)  # more than one request holds
        end(log, "ckpt")
    (run / "run.json").write_text(json.dumps({"config": {"tracking_uri": flags.tracking_uri}}))
    for sent in (1500 * 3, 0, 0):
        assert cli.run(["sync", str(run), "--json"]) == 0
        found = json.loads(capfd.readouterr().out)
        assert (found["points_in_log"], found["points_sent"]) == (1500 * 3, sent)
        run_id = found["runs"][0]["mlflow_run_id"]
        assert missing_and_extra(run, str(flags.tracking_uri), run_id) == (0, 0)
    assert losses(str(flags.tracking_uri)) == expected(1500)
    client = MlflowClient(tracking_uri(flags))
    (tracked,) = client.search_runs([client.get_experiment_by_name("alignment").experiment_id])
    assert (tracked.info.status, tracked.data.params, tracked.data.tags["t"]) == ("FINISHED", {"lr": "0.1"}, "x")
    artifacts = client.list_artifacts(tracked.info.run_id, "model/checkpoint")
    assert [Path(item.path).name for item in artifacts] == sorted(path.name for path in (run / "ckpt").iterdir())


def test_points_that_the_server_has_already_are_not_stored_twice(flags: TrackingFlags, run: Path) -> None:
    with EventLog(run) as log:
        begin(log)
        steps(log, 1, 5)
    lines = entries(run)
    client = MlflowClient(tracking_uri(flags))
    run_id = tracking.get_or_create_run(client, tracking_uri(flags), str(run), lines)
    client.log_batch(run_id, metrics=[p for line in lines[2:4] for p in to_metrics(line)])
    assert sync_run(run, tracking_uri(flags))["points_sent"] == 5 * 3
    assert missing_and_extra(run, tracking_uri(flags), run_id) == (0, 0)
    assert losses(str(flags.tracking_uri)) == expected(5)


def test_a_run_counts_as_synced_only_when_the_server_has_acknowledged_all_of_it(
    flags: TrackingFlags, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = tracking_uri(flags)
    with EventLog(run) as log:
        begin(log)
        steps(log, 1, 1000)
        end(log)
    log_batch, calls = MlflowClient.log_batch, []

    def away(self: MlflowClient, *args: Any, **more: Any) -> None:
        calls.append(more)
        if len(more.get("metrics", ())) and len(calls) > 2:
            raise OSError("the server is away")
        log_batch(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        with pytest.raises(OSError, match="is away"):
            sync_run(run, uri)
    assert len(calls) == 3, "one request was acknowledged"
    assert pending_runs(run.parent) == [run]
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", lambda *_: (_ for _ in ()).throw(OSError("away at the end")))
        with pytest.raises(OSError, match="away at the end"):
            sync_run(run, uri)
    assert pending_runs(run.parent) == [run], "its end is missing"
    synced = sync_run(run, uri)
    assert synced["points_sent"] == 0
    assert missing_and_extra(run, uri, synced["mlflow_run_id"]) == (0, 0)
    assert pending_runs(run.parent) == []


def test_another_server_gets_every_point(flags: TrackingFlags, run: Path, tmp_path: Path) -> None:
    with EventLog(run) as log:
        begin(log)
        steps(log, 1, 5)
        end(log)
    sync_run(run, tracking_uri(flags))
    other = f"sqlite:///{tmp_path}/other.db"
    synced = sync_run(run, other)
    assert synced["points_sent"] == 5 * 3
    assert missing_and_extra(run, other, synced["mlflow_run_id"]) == (0, 0)


def test_the_next_run_brings_over_what_the_one_before_could_not(flags: TrackingFlags, run: Path) -> None:
    with EventLog(run) as log:
        begin(log)
        steps(log, 1, 3)
        end(log)
    assert pending_runs(run.parent) == [run]
    following = run.with_name("two")
    following.mkdir()
    with EventLog(following) as log:
        begin(log, "k2")
        tracker = Tracker(flags, following)
        steps(log, 1, 2)
        end(log)
    assert tracker.close()
    assert losses(str(flags.tracking_uri), "k1") == expected(3)
    assert losses(str(flags.tracking_uri), "k2") == expected(2)
    assert pending_runs(run.parent) == []
    assert json.loads((run / MLFLOW_SYNC).read_text())["bytes"] == (run / "events.jsonl").stat().st_size


@pytest.mark.parametrize("answer", ["silent", "500"])
def test_a_server_that_is_slow_or_broken_is_not_waited_for(
    answer: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer == "silent":
                silence.wait()
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    silence = threading.Event()
    monkeypatch.setattr(tracker_module, "PATIENCE_S", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    broken = http.server.ThreadingHTTPServer(("127.0.0.1", free_port()), Broken)
    threading.Thread(target=broken.serve_forever, daemon=True).start()
    began = time.monotonic()
    with EventLog(run) as log:
        begin(log)
        tracker = Tracker(TrackingFlags(tracking_uri=f"http://127.0.0.1:{broken.server_port}"), run)
        steps(log, 1, 100)
        end(log)
    assert not tracker.close()
    assert time.monotonic() - began < 300, "it was given up before the request was"
    assert tracker.run_id is None
    assert "ray-app sync" in capsys.readouterr().err
    silence.set()
    broken.shutdown()


def test_an_event_log_that_is_damaged_or_missing_is_named(flags: TrackingFlags, run: Path) -> None:
    with pytest.raises(StoreError, match=r"has no events\.jsonl"):
        sync_run(run, tracking_uri(flags))
    with EventLog(run) as log:
        begin(log)
        steps(log, 1, 3)
    path = run / "events.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"global_step": 2', b'"global_step": 7'))
    with pytest.raises(StoreError, match=r"events\.jsonl, line 3 is damaged"):
        sync_run(run, tracking_uri(flags))


def test_an_epoch_becomes_flat_names_that_mlflow_takes() -> None:
    line = {
        "kind": "epoch",
        "time": 2.5,
        "global_step": 7,
        "epoch": 1,
        "val": {"pairs": 3, "cosine_accept_rate": {"0.80": 0.5}, "percentiles": {"P10": 0.1}},
        "save_seconds": None,
    }
    found = {point.key: (point.value, point.step, point.timestamp) for point in to_metrics(line)}
    assert found == {
        "epoch/epoch": (1.0, 7, 2500),
        "epoch/val/pairs": (3.0, 7, 2500),
        "epoch/val/cosine_accept_rate_0.80": (0.5, 7, 2500),
        "epoch/val/percentiles/P10": (0.1, 7, 2500),
    }
    assert to_metrics({"kind": "resumed", "epoch": 1, "global_step": 7, "time": 1.0}) == []


def test_a_database_in_the_current_folder_gets_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(TrackingFlags()) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(TrackingFlags(tracking_uri="sqlite:////x/y.db")) == "sqlite:////x/y.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking_uri(TrackingFlags()) == "http://server:5000"
    with pytest.raises(ConfigError, match="use sqlite:///FILE"):
        tracking_uri(TrackingFlags(tracking_uri="file:///mlruns"))


def test_the_default_database_is_in_the_current_folder_whatever_the_name_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "what?x=1 %41 #2 [night]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    uri = tracking_uri(TrackingFlags())
    assert database_file(uri) == folder / "mlflow.db"
    with sqlite3.connect(folder / ".mlflow.db.partial") as left:  # a process was killed while it made one
        left.execute("CREATE TABLE _alembic_tmp_tags (x)")
    with ThreadPoolExecutor() as pool:
        client, _ = pool.map(connect, [uri, uri])
    assert {path.name for path in folder.iterdir()} == {"mlflow.db"}
    run_id = client.create_run(experiment_id(client, TrackingFlags(tracking_uri=uri))).info.run_id
    client.log_text(run_id, "x", "x.txt")
    assert (folder / "mlflow.db").is_file()
    assert (folder / "mlartifacts" / "alignment" / run_id / "artifacts" / "x.txt").read_text() == "x"
    assert check_tracking(None).state == "ok"


def test_an_experiment_that_was_deleted_is_named_with_the_way_to_restore_it(
    flags: TrackingFlags, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = MlflowClient(str(flags.tracking_uri))
    number = experiment_id(client, flags)
    client.delete_experiment(number)
    with EventLog(run) as log:
        begin(log)
        tracker = Tracker(flags, run)
        end(log)
    assert not tracker.close()
    printed = capsys.readouterr().err
    assert "the experiment 'alignment' was deleted there" in printed
    assert f"mlflow experiments restore --experiment-id {number}" in printed
    assert "does not answer" not in printed
    assert cli.run(["sync", str(run), "--tracking-uri", str(flags.tracking_uri)]) == 2
    client.restore_experiment(number)
    assert cli.run(["sync", str(run), "--tracking-uri", str(flags.tracking_uri)]) == 0


def test_what_the_registry_lacks_is_named_with_what_it_has(database: str) -> None:
    client = MlflowClient(database)
    lacks = {
        "models:/nope@champion": r"it has no model 'nope'; its models: none\. `ray-app promote RUN` registers",
        "models:/alignment@best": r"versions of 'alignment': 1 to 2; its aliases: @champion \(version 2\)\.",
        "models:/alignment/7": "versions of 'alignment': 1 to 2",
    }
    for uri, words in lacks.items():
        with pytest.raises(RegistryError, match=f"'{uri}' is not in the registry: {words}"):
            find_version(client, uri)
        if uri.endswith("nope@champion"):
            client.create_registered_model("alignment")
            for _ in range(2):
                client.create_model_version("alignment", "runs:/x/checkpoint")
            client.set_registered_model_alias("alignment", "champion", "2")


def test_a_refusal_is_quoted_and_loopback_is_reached_without_a_proxy(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Forbidden(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"error_code": "PERMISSION_DENIED", "message": "alice may not read this"}'
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}" if name == "http_proxy" else "")
    set_defaults()
    forbidden = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidden)
    threading.Thread(target=forbidden.serve_forever, daemon=True).start()
    with EventLog(run) as log:
        begin(log)
        tracker = Tracker(TrackingFlags(tracking_uri=f"http://127.0.0.1:{forbidden.server_port}"), run)
        end(log)
    assert not tracker.close()
    printed = capsys.readouterr().err
    assert "PERMISSION_DENIED: alice may not read this" in printed
    assert "does not answer" not in printed
    check = check_tracking(f"http://127.0.0.1:{forbidden.server_port}")
    assert (check.state, "alice may not read this" in check.value) == ("problem", True)
    forbidden.shutdown()


def test_a_message_ends_with_the_cause_of_a_connection_that_failed(run: Path) -> None:
    with EventLog(run) as log:
        begin(log)
    with pytest.raises(MlflowException) as caught:
        sync_run(run, f"http://me:secret@127.0.0.1:{free_port()}/{'x' * 300}")
    assert failure_cause(caught.value) == "Failed to establish a new connection: [Errno 111] Connection refused"
    assert is_away(caught.value)


def test_a_log_that_was_replaced_is_sent_from_its_beginning(database: str, run: Path) -> None:
    with EventLog(run) as log:
        begin(log, "replaced")
        steps(log, 1, 5)
    sync_run(run, database)
    path = run / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    with EventLog(run) as log:
        for step in range(1, 8):  # lines as long as those before
            log.write("step", global_step=step, time=json.loads(lines[1])["time"], loss=2.0 / step, epoch=1, pairs=1)
    assert sync_run(run, database)["points_sent"] == 7 * 3


@pytest.mark.parametrize("artifacts", ["../../outside", "/etc", 7])
def test_artifacts_outside_of_the_run_are_not_uploaded(database: str, run: Path, artifacts: Any) -> None:
    (run.parents[1] / "outside").mkdir()
    (run.parents[1] / "outside" / "secret").touch()
    with EventLog(run) as log:
        begin(log, f"outside {artifacts}")
        end(log, artifacts)
    (run / "run.json").write_text('{"config": {"tracking_uri": null}}')
    with pytest.raises(StoreError, match="is no folder of a run"):
        sync_run(run, database)
    with pytest.raises(StoreError, match="is no folder of a run"):
        run_sync(SyncConfig(runs=(str(run),), tracking_uri=database))


def test_off_a_terminal_progress_is_a_line_for_what_comes_before_the_first_step_and_for_each_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    val = {"loss": 0.2, "cos_sim_mean": 0.9, "cosine_accept_rate": {"0.80": 0.75}}
    with EventLog(tmp_path) as log:
        log.write("workers_started", workers=1)
        log.step(1, loss=1.0, epoch=1, cos_sim=0.5, pairs=8, seconds=1.0)
        train = {"loss": 0.25, "cos_sim": 0.8, "pairs": 16, "seconds": 2.0}
        log.epoch(1, train=train, val=val)
        log.epoch(2, train=train, val={**val, "baselines": {"white": 0.5, "mean_target": 0.875}, "lift": -0.125})
    with TrainingProgress(tmp_path, 2) as progress:
        progress.show("starting 1 worker")
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    epoch = "train loss 0.2500 cos_sim 0.8000 val loss 0.2000 cos_sim 0.9000 accepted at 0.80 75.0%"
    assert sorted(lines) == [
        f"epoch 1 {epoch} 8.0 pairs/s",
        f"epoch 2 {epoch} (best baseline mean_target 87.5%) 8.0 pairs/s",
        "first step",
        "starting 1 worker",
    ]


def test_on_a_terminal_nothing_that_is_not_known_yet_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(train_progress, "make_console", lambda **_: console)
    with EventLog(tmp_path) as log, TrainingProgress(tmp_path, 2) as progress:
        progress.show("reading 8 training and 2 validation pairs")
        log.write("workers_started", workers=1)
    assert "reading 8 training and 2 validation pairs" in screen.getvalue()
    assert "first step" in screen.getvalue()
    assert not re.search(r"nan|pairs/s|loss", screen.getvalue())


def test_system_metrics_are_on_the_run_where_mlflow_s_own_variable_asks_for_them(
    tmp_path: Path, flags: TrackingFlags, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run, uri = tmp_path / "run", tracking_uri(flags)
    run.mkdir()
    with EventLog(run) as log:
        begin(log)
        tracker = Tracker(flags, run)
        deadline = time.monotonic() + 120.0
        while not tracker.run_id or not [
            name for name in MlflowClient(uri).get_run(tracker.run_id).data.metrics if name.startswith("system/")
        ]:
            assert time.monotonic() < deadline, "no system metric came"
            time.sleep(0.1)
        end(log)
    assert tracker.close()
    assert "system/cpu_utilization_percentage" in MlflowClient(uri).get_run(str(tracker.run_id)).data.metrics
