"""Runs in a real S3 server: finished checkpoints are whole there, and any machine can resume from the URI."""

import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from mlflow_process import missing_and_extra
from s3_process import S3
from small_runs import make_run
from small_saves import found, save

from ray_app import cli
from ray_app.commands.train.command import run_train
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, WorkerData, batches_in_memory, train_epochs
from ray_app.config.base import TrackingFlags
from ray_app.config.train import TrainConfig
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import CheckpointError, ConfigError, StoreError, TrainingError
from ray_app.runs import mirror, succession
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries, require_latest_driver, tail
from ray_app.runs.run_dir import RunDir, best_of_run, open_run
from ray_app.runs.succession import Lease, Successors, TakenOver
from ray_app.store import scratch
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_file, verify_folder
from ray_app.store.checkpoint import MODEL, load_checkpoint
from ray_app.store.checkpoint_transfer import upload_dir
from ray_app.store.filesystem import RemoteDir
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs
from ray_app.tracking.model_registry import checkpoint_folder
from serve.model.model_source import model_source

TINY: dict[str, Any] = {
    "num_epochs": 8,
    "early_stop_patience": 8,
    "hidden_dim": 4,
    "batch_size": 16,
    "cpus_per_worker": 1,  # threads: with another number sums round otherwise
}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], RunDir]:
    """Another process's copy of a run at a URI: of a folder, by pyarrow, where many requests take little time."""

    def make(uri: str) -> RunDir:
        uri = uri if ":" in uri else f"file://{tmp_path}/there/{uri}"
        return RunDir(Path(tempfile.mkdtemp(dir=tmp_path)), RemoteDir(uri, 1.0))

    return make


def lines_of(run: RunDir) -> list[int]:
    return [line["n"] for line in entries(run.path)]


def logs(run: RunDir) -> Successors:
    assert run.mirror.remote
    return Successors(run.mirror.remote, EVENT_LOG)


# --- saves ---


def test_a_fresh_copy_finds_what_another_saved_and_the_same_places_stay_as_on_a_disk(
    copy: Callable[[str], RunDir], s3: S3, tmp_path: Path
) -> None:
    uri = s3.uri("bucket/kept")
    run, local = copy(uri), RunDir(tmp_path / "local")
    local.path.mkdir()
    run.create({"name": "kept"})
    with run.event_log():
        for epoch in (1, 2, 3):
            save(run, epoch)
            save(local, epoch)
    assert found(copy(uri)) == 3
    there = {str(Path(key).relative_to("kept")) for key in s3.keys("bucket") if key.startswith("kept/")}
    on_disk = {str(path.relative_to(local.path)) for path in local.path.rglob("*") if path.is_file()}
    assert {key for key in there if not key.startswith(("events.jsonl", "run.json")) and "." in key} == on_disk
    with pytest.raises(StoreError, match=r"s3://bucket/kept already holds something"):
        copy(uri).create({})


def test_killed_at_any_request_a_save_leaves_a_whole_epoch_and_the_next_works(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy("killed")
    run.create({})
    with run.event_log() as log:
        log.write("note", n=0)
        for epoch in (1, 2, 3):
            save(run, epoch)
    epochs, epoch, whole = [], 3, False
    answer = RemoteDir.retry
    while not whole:
        run, left = copy("killed"), [len(epochs) + 1]

        def dying(self: RemoteDir, verb: str, name: str, ask: Any, left: list[int] = left) -> Any:
            left[0] -= verb in ("written", "deleted")
            if left[0] <= 0:
                raise KeyboardInterrupt
            return answer(self, verb, name, ask)

        found(run)
        with suppress(KeyboardInterrupt), run.event_log(), monkeypatch.context() as patch:
            patch.setattr(RemoteDir, "retry", dying)
            save(run, epoch + 1)
            whole = True
        after = found(copy("killed"))
        epochs.append(after - epoch)
        epoch = after
        if not whole:
            with (run := copy("killed")).event_log():
                save(run, epoch + 1)
            epoch += 1
            assert found(copy("killed")) == epoch
    assert len(epochs) > 12
    assert set(epochs) == {0, 1}
    assert epochs[-1] == 1


def test_a_damaged_object_is_named_and_the_checkpoint_before_is_resumed(
    copy: Callable[[str], RunDir], s3: S3, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = s3.uri("bucket/hurt")
    run = copy(uri)
    run.create({})
    with run.event_log():
        for epoch in (1, 2):
            save(run, epoch)
    name = "training_state/epoch_0002/training_state.safetensors"
    data = run.mirror.storage.read(name)
    run.mirror.storage.write(name, data[:-1] + bytes([data[-1] ^ 1]))
    fresh = copy(uri)
    assert fresh.latest_resumable() == "epoch_0001"
    assert f"s3://bucket/hurt/{name} is damaged" in capsys.readouterr().err
    with fresh.event_log():
        save(fresh, 2)
    assert found(copy(uri)) == 2


# --- the event log ---


def test_a_reader_sees_an_event_log_grow(copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 60.0)
    writer, reader = copy("grows"), copy("grows")
    with writer.event_log() as log:
        for n in range(20):
            log.write("note", n=n)
            if n % 3:
                writer.mirror.push()
                reader.refresh()
                assert lines_of(reader) == list(range(n + 1))
    reader.refresh()
    assert (reader.path / EVENT_LOG).read_bytes() == (writer.path / EVENT_LOG).read_bytes()


def test_an_event_log_whose_object_is_damaged_is_named(copy: Callable[[str], RunDir]) -> None:
    writer = copy("damaged")
    with writer.event_log() as log:
        log.write("note", n=0)
    storage = writer.mirror.storage
    [name] = logs(writer).names()
    storage.write(name, storage.read(name).replace(b'"n": 0', b'"n": 1'))
    (reader := copy("damaged")).refresh()
    with pytest.raises(StoreError, match=r"events\.jsonl, line 1 is damaged"):
        entries(reader.path)


def test_a_writer_that_was_taken_over_from_stops_and_what_it_uploads_at_any_later_time_changes_nothing(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 60.0)
    old, new = copy("fenced"), copy("fenced")
    writing = old.event_log()
    first = writing.__enter__()
    first.write("note", n=0)
    old.mirror.push()
    [own] = logs(old).names()
    with new.event_log() as second:
        first.write("note", n=1)
        second.write("note", n=10)
    assert lines_of(old) == [0, 1]
    old.mirror.storage.write(own, (old.path / EVENT_LOG).read_bytes())  # a request that was under way
    for refused in (old.mirror.push, lambda: writing.__exit__(None, None, None)):
        with pytest.raises(TakenOver, match=r"/there/fenced continues in another process"):
            refused()
    old.mirror.storage.write(own, (old.path / EVENT_LOG).read_bytes())
    reader = copy("fenced")
    for run in (reader, old, new):
        run.refresh()
        assert lines_of(run) == [0, 10]
    with copy("fenced").event_log() as third:
        third.write("note", n=11)
    reader.refresh()
    assert lines_of(reader) == [0, 10, 11]
    assert len(logs(reader).names()) == 1


def test_lines_that_were_uploaded_before_a_process_took_over_are_kept_at_every_moment_of_it(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old writer pushes between any two requests of the new one; the new one may end after any of them."""
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 60.0)
    ask, moment, ended = RemoteDir.retry, 0, True
    while ended:
        old, new = copy(f"moment{moment}"), copy(f"moment{moment}")
        ended, uploaded = taken_over_at(moment, old, new, ask, monkeypatch)
        with (reader := copy(f"moment{moment}")).event_log():
            assert lines_of(reader) in ([0, 1], [0, *uploaded])
        moment += 1
    assert moment > 8


def taken_over_at(
    moment: int, old: RunDir, new: RunDir, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[bool, list[int]]:
    """Let `old` push a line before a request of `new`; return whether there was such a request, and what was kept."""
    requests, uploaded = itertools.count(), []
    with suppress(TakenOver), old.event_log() as log:

        def between(self: RemoteDir, verb: str, name: str, request: Any) -> Any:
            if next(requests) == moment:
                log.write("note", n=1)
                with suppress(TakenOver), monkeypatch.context() as patch:
                    patch.setattr(RemoteDir, "retry", ask)
                    old.mirror.push()
                    uploaded.append(1)
                if moment % 2:
                    raise KeyboardInterrupt
            return ask(self, verb, name, request)

        log.write("note", n=0)
        old.mirror.push()
        with suppress(KeyboardInterrupt), monkeypatch.context() as patch:
            patch.setattr(RemoteDir, "retry", between)
            with new.event_log():
                pass
    return next(requests) > moment, uploaded


def test_a_follower_of_an_event_log_reads_on_when_lines_of_a_writer_that_was_cut_off_are_replaced(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 60.0)
    old, new, reader = copy("followed"), copy("followed"), copy("followed")
    writing = old.event_log()
    first = writing.__enter__()
    first.write("note", n=0)
    old.mirror.push()
    reader.refresh()
    with EventLog(reader.path) as log:  # as a process has it open that lends its right to write
        lines = tail(reader.path, threading.Event())
        assert [line["n"] for line in next(lines)] == [0]
        first.write("note", n=1)
        reader.mirror.remote.write(logs(reader).names()[-1], (old.path / EVENT_LOG).read_bytes())
        reader.refresh()
        assert [line["n"] for line in next(lines)] == [1]
        new.mirror.remote.write(logs(new).names()[-1], (reader.path / EVENT_LOG).read_bytes().splitlines(True)[0])
        with new.event_log() as second:
            second.write("note", n=10)
            second.write("note", n=11)
        reader.refresh()
        assert [line["n"] for line in next(lines)] == [0, 10, 11]
        log.write("note", n=12)
        assert [line["n"] for line in next(lines)] == [12]
    assert lines_of(reader) == [0, 10, 11, 12]
    with suppress(TakenOver):
        writing.__exit__(None, None, None)


def test_a_driver_that_another_has_followed_ends_and_so_do_its_workers(copy: Callable[[str], RunDir]) -> None:
    for started in (1000.0, 1060.0):
        with copy("drivers").event_log() as log:
            log.write("run_started", time=started)
    worker = copy("drivers")
    worker.refresh()
    require_latest_driver(worker.path, 1060.0)
    with pytest.raises(StoreError, match="another driver took over this run 60 s after this one started"):
        require_latest_driver(worker.path, 1000.0)


def test_a_process_that_was_taken_over_takes_nothing_from_the_one_that_continues(
    copy: Callable[[str], RunDir],
) -> None:
    for started in (1000.0, 1060.0):
        with copy("overtaken").event_log() as log:
            log.write("run_started", time=started)
    old, new = copy("overtaken"), copy("overtaken")
    with new.event_log(1060.0) as log:
        with pytest.raises(StoreError, match="another driver took over this run"), old.event_log(1000.0):
            pass
        log.write("note", n=1)
        new.mirror.push()


def test_a_lease_that_is_half_written_is_no_answer(copy: Callable[[str], RunDir]) -> None:
    run = copy("half")
    run.mirror.storage.write(f"{mirror.DRIVER_LEASE}.000001-0123abcd", b'{"process": ')
    with pytest.raises(StoreError, match=r"the lease in .*half cannot be read"), run.mirror.lease():
        pass


def test_a_best_checkpoint_that_is_gone_is_named(copy: Callable[[str], RunDir]) -> None:
    run = copy("gone")
    run.mirror.storage.write("best.json", b'{"checkpoint": "checkpoints/epoch_0001"}')
    with pytest.raises(CheckpointError, match=r"checkpoints/epoch_0001 is missing, though best.json names it"):
        run.best()


def test_an_upload_whose_answer_is_lost_is_not_taken_for_another_writer(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 60.0)
    run, write = copy("unknown"), RemoteDir.write

    def lost(self: RemoteDir, name: str, data: bytes) -> None:
        write(self, name, data)
        raise StoreError("the answer was lost")

    with run.event_log() as log:
        for n in range(3):
            log.write("note", n=n)
            with monkeypatch.context() as patch:
                patch.setattr(RemoteDir, "write", lost)
                with pytest.raises(StoreError, match="was lost"):
                    run.mirror.push()
    reader = copy("unknown")
    reader.refresh()
    assert lines_of(reader) == [0, 1, 2]


def test_a_run_has_one_driver_and_one_that_was_killed_is_followed_when_its_lease_has_expired(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 0.05)
    monkeypatch.setattr(succession, "LEASE_S", 1.0)
    first, second = copy("driven"), copy("driven")
    refusal = rf"is driven by process {os.getpid()} on .*; wait for its end, or stop it"
    with first.exclusive({}), pytest.raises(StoreError, match=refusal):
        second.exclusive().__enter__()
    with second.exclusive():
        pass  # the first released it
    assert first.mirror.remote
    killed = Lease(first.mirror.remote, mirror.DRIVER_LEASE)
    killed.take()
    began = time.monotonic()
    with second.exclusive():
        assert time.monotonic() - began >= 0.9, "it may be alive that long"
        with pytest.raises(TakenOver, match="continues in another process"):
            killed.renew()


def test_a_driver_that_another_has_followed_is_interrupted_and_sends_no_more_signals(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 0.05)
    run = copy("lost")

    def drive() -> None:
        with run.exclusive({}):
            assert run.mirror.remote
            Successors(run.mirror.remote, mirror.DRIVER_LEASE).join(b"{}")
            with suppress(KeyboardInterrupt):
                time.sleep(400)
            run.stop_file.touch()
            run.mirror.push_signals("stop")
            with run.event_log():
                raise AssertionError("it writes no more")

    with pytest.raises(TakenOver, match="/there/lost continues in another process"):
        drive()
    assert "stop" not in run.mirror.storage.listdir(), "it would stop the workers of the other driver"


def test_a_worker_whose_event_log_another_one_writes_is_asked_to_end(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 0.05)
    old, new = copy("noticed"), copy("noticed")
    with suppress(TakenOver), old.event_log(), new.event_log():
        wait_until(old.stop_requested)
        with pytest.raises(TakenOver, match="continues in another process"):
            save(old, 1)


def test_of_drivers_that_start_a_run_at_one_moment_one_has_it_and_the_others_are_refused(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 1.0)
    barrier, answers = threading.Barrier(4), []

    def start(n: int) -> None:
        run = copy("together")
        barrier.wait()
        try:
            with run.exclusive({"n": n}):
                answers.append(run.metadata()["n"] == n)
                wait_until(lambda: len(answers) == 4)
        except StoreError as error:
            answers.append(str(error))

    threads = [threading.Thread(target=start, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(True) == 1, answers
    assert sum("is driven by process" in str(answer) for answer in answers) == 3, answers


def test_signs_and_lines_cross_between_driver_and_worker(
    copy: Callable[[str], RunDir], s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 0.05)
    driver, worker = copy(s3.uri("bucket/signs")), copy(s3.uri("bucket/signs"))
    driver.mirror.storage.write("run.json", b"{}")
    driver.mirror.storage.write("stop", b"")  # of a driver before
    with driver.exclusive(), driver.synced(), worker.event_log() as log:
        assert "stop" not in driver.mirror.storage.listdir()
        log.write("note", n=0)
        wait_until(lambda: (driver.path / EVENT_LOG).is_file() and lines_of(driver) == [0])
        for sign in (driver.stop_file, driver.resize_file):
            sign.touch()
            wait_until(lambda sign=sign: (worker.path / sign.name).exists())
            sign.unlink()
            wait_until(lambda sign=sign: not (worker.path / sign.name).exists())
        log.write("note", n=1)
    assert lines_of(driver) == [0, 1], "the last lines come with the end"


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_copy_goes_with_its_process_and_one_that_was_left_behind_goes_with_the_next(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young, other = (tmp_path / f"{scratch.PREFIX}{name}" for name in ("leftover", "recently", "of a user"))
    with open_run(s3.uri("bucket/x")) as first, open_run(s3.uri("bucket/x")) as second:
        for folder in (left, young, other, first.path):
            folder.mkdir(mode=0o700, exist_ok=True)
            (folder / "file").touch()
        for folder in (left, other, first.path):
            os.utime(folder, (0, 0))
        with open_run(s3.uri("bucket/x")):
            assert {path.name for path in tmp_path.iterdir()} >= {young.name, other.name, first.path.name}
            assert second.path.is_dir()
            assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name}


# --- checkpoints ---


def test_every_reader_takes_a_checkpoint_or_a_run_at_a_uri(s3: S3, small_store: Path, tmp_path: Path) -> None:
    local = make_run(small_store, tmp_path / "run")
    uri, there = s3.uri("bucket/read"), RemoteDir(s3.uri("bucket/read"), 1.0)
    with pytest.raises(CheckpointError, match="s3://bucket/read is not a folder"):
        best_of_run(uri)
    there.write("run.json", (local / "run.json").read_bytes())
    with pytest.raises(CheckpointError, match="without a finished epoch"):
        best_of_run(uri)
    there.write("best.json", b'{"checkpoint": "../../elsewhere"}')
    with pytest.raises(CheckpointError, match=r"best\.json is damaged.*elsewhere' is no folder of a run"):
        best_of_run(uri)
    best = "checkpoints/epoch_0001"
    upload_dir(local / best, there, best)
    there.write("best.json", (local / "best.json").read_bytes())
    expected = load_checkpoint(local / best)
    assert best_of_run(uri) == there.uri_of(best)
    for where in (uri, there.uri_of(best)):
        with checkpoint_folder(where, TrackingFlags()) as folder:
            assert load_checkpoint(folder).sha256 == expected.sha256
        assert not folder.exists()
    source = model_source(there.uri_of(best), None)
    identity = source.current()
    assert (identity.digest, identity.source) == (expected.sha256, "epoch_0001")
    with source.files(identity) as folder:
        assert verify_folder(folder) == expected.sha256
    there.write(f"{best}/{MODEL}", b"x")
    with pytest.raises(CheckpointError, match=rf"s3://bucket/read/{best}/{MODEL} is damaged"), source.files(identity):
        pass
    there.delete(f"{best}/{MODEL}")
    with pytest.raises(CheckpointError, match=rf"{MODEL} is missing, though {CHECKSUMS_FILE} lists it"):
        source.files(identity).__enter__()
    there.delete(f"{best}/{CHECKSUMS_FILE}")
    with pytest.raises(CheckpointError, match=f"has no {CHECKSUMS_FILE}"):
        source.current()


def test_where_only_a_disk_will_do_a_uri_is_refused() -> None:
    for words in (
        ["import-checkpoint", "reference.pt", "--out", "s3://bucket/checkpoint"],
        ["evaluate", "--store", "s", "--checkpoint", "c", "--out", "s3://bucket/report"],
        ["train", "--store", "s", "--out", "o", "--init-from", "s3://bucket/run/init"],
    ):
        with pytest.raises(ConfigError, match=r"s3:/… is a URI; name one on a disk"):
            cli.parse(words[0], cli.COMMANDS[words[0]], None, words[1:])


# --- a run ---


def undisturbed(cfg: TrainConfig, out: Path) -> str:
    """SHA-256 of the weights of the same run in a folder, without Ray, computed with as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(TINY["cpus_per_worker"])
    try:
        return weights_without_ray(cfg, out)
    finally:
        torch.set_num_threads(threads)


def weights_without_ray(cfg: TrainConfig, out: Path) -> str:
    cfg, store = cfg.at(out), PairStore.open(cfg.store)
    split = split_pairs(store.index, cfg.split_config)
    worker = WorkerContext(RunContext.of(cfg, store), 0, 1, torch.device("cpu"))
    lanes = ShardedBatchOrder(len(split.train), cfg.batch_size, cfg.seed)
    train, val = (
        PairTensors(np.arange(len(rows)), *map(torch.tensor, store.read_rows(rows)))
        for rows in (split.train, split.val)
    )
    out.mkdir()
    run, pairs = RunDir(out), WorkerData(lambda state: batches_in_memory(train, lanes, state, worker), True, val)
    with EventLog(out) as log:
        train_epochs(worker, run, pairs, log, {}, lambda *_: None)
    best = run.best()
    assert best is not None
    return sha256_file(best / MODEL)


@pytest.fixture
def killer(s3: S3) -> Iterator[Callable[[str], list[int]]]:
    """Kills a training worker once an object is there; says whom."""
    threads: list[threading.Thread] = []

    def kill_after(key: str) -> list[int]:
        killed: list[int] = []

        def watch() -> None:
            wait_until(lambda: key in s3.keys("bucket"))
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    os.kill(process.pid, signal.SIGKILL)
                    killed.append(process.pid)

        threads.append(threading.Thread(target=watch))
        threads[-1].start()
        return killed

    yield kill_after
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("ray_cluster")
def test_a_run_whose_processes_died_is_resumed_from_the_uri_alone_and_ends_with_the_same_bytes(
    s3: S3,
    small_store: Path,
    tmp_path: Path,
    killer: Callable[[str], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The second driver has an empty folder of its own, as on another machine."""
    uri, database = s3.uri("bucket/runs/one"), f"sqlite:///{tmp_path / 'mlflow.db'}"
    cfg = TrainConfig(store=str(small_store), out=uri, tracking_uri=database, max_failures=0, **TINY)
    killed = killer(f"runs/one/checkpoints/epoch_0002/{CHECKSUMS_FILE}")
    with pytest.raises(
        TrainingError, match=r"processes died .* resume with: ray-app train --resume 's3://bucket/runs"
    ):
        run_train(cfg)
    assert killed
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    capfd.readouterr()
    assert cli.run(["train", "--resume", uri, "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["resumed_from_step"] >= 2 * result["steps"] // 8
    assert result["model_sha256"] == undisturbed(cfg, tmp_path / "undisturbed")
    assert result["run"] == uri
    assert result["checkpoint"].startswith("s3://bucket/runs/one/checkpoints/epoch_")
    assert not list((tmp_path / "elsewhere").glob("ray-app-*")), "no copy is left"
    with open_run(uri) as run:
        run.refresh()
        lines = entries(run.path)
        steps = [line["global_step"] for line in lines if line["kind"] == "step"]
        assert steps == list(range(1, result["steps"] + 1)), "each step is logged once"
        assert [line["kind"] for line in lines if line["kind"] in ("run_started", "run_ended")] == [
            "run_started",
            "run_ended",
        ] * 2
        assert run.metadata()["config"]["out"] == uri
    client = MlflowClient(database)
    tracked = client.get_run(result["mlflow_run_id"])
    assert (tracked.info.status, tracked.data.tags["event_log"], tracked.data.params["out"]) == ("FINISHED", uri, uri)
    assert cli.run(["sync", uri, "--tracking-uri", f"sqlite:///{tmp_path / 'new.db'}", "--json"]) == 0
    (synced,) = json.loads(capfd.readouterr().out)["runs"]
    assert synced["run"] == uri
    with open_run(uri) as run:
        run.refresh()
        database = f"sqlite:///{tmp_path / 'new.db'}"
        assert missing_and_extra(run.path, database, synced["mlflow_run_id"]) == (0, 0)
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    words = ["--store", str(small_store), "--out", str(tmp_path / "report"), "--tracking-uri", database, "--json"]
    assert cli.run(["evaluate", "--checkpoint", uri, *words]) == 0
    assert json.loads(capfd.readouterr().out)["checkpoint"] == uri
