"""Stores in a real S3 server on this machine: as on a disk, and nothing is lost when the server fails midway."""

import json
import pickle
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_source import SMALL, NumpySource
from s3_process import S3

from ray_app import cli
from ray_app.commands.inspect.command import run_inspect
from ray_app.commands.prepare.command import prepare
from ray_app.commands.prepare.sole_builder import sole_builder
from ray_app.commands.prepare.store_builder import SCRATCH, build_task, claim_store, finish, finished
from ray_app.config.prepare import InspectConfig, PrepareFlags
from ray_app.config.train import TrainConfig
from ray_app.data.array_store import claim_folder
from ray_app.data.pairs_dataset import pairs_dataset, to_arrays
from ray_app.errors import ConfigError, StoreError
from ray_app.sources.base import RawPair, RejectedPair, SourceTask
from ray_app.store.filesystem import LocalDir, RemoteDir, absolute, open_storage
from ray_app.store.manifest import MANIFEST, Features
from ray_app.store.pair_store import PairStore

BOTH = Features(event=SMALL, target=SMALL)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def gated_source(gate: Path) -> NumpySource:
    """A source whose first two tasks run at once and the others once `gate` exists, after a failure."""

    @dataclass(frozen=True)
    class Gated(NumpySource):
        def pairs(self, task: SourceTask) -> Iterator[RawPair | RejectedPair]:
            while task.spec["sequence"] >= 2 and not gate.exists():
                time.sleep(0.05)
            yield from NumpySource.pairs(self, task)

    return Gated()


def wait_for(s3: S3, prefix: str, num_files: int) -> list[str]:
    """Names of finished files, once there are so many; their records too are written then."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        keys = s3.keys("bucket")
        found = [
            key
            for key in keys
            if key.startswith(f"{prefix}/drive") and f"{prefix}/{SCRATCH}/{Path(key).stem}.json" in keys
        ]
        if len(found) >= num_files:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{s3.keys('bucket')} after a minute")


# --- one reader, one writer ---


def test_a_store_in_a_bucket_has_the_files_of_one_on_a_disk(s3: S3, small_store: Path) -> None:
    where, source = s3.uri("bucket/deep/er/s"), NumpySource()
    claim_store(where, source, source.tasks(), BOTH)
    done = [build_task(source, task, where, BOTH) for task in source.tasks()]
    assert finished(where, source.tasks()[0]) == done[0]
    assert finished(where, SourceTask("other", 1, {})) is None
    with pytest.raises(StoreError, match=r"s3://bucket/deep/er/s has no manifest\.json.*`ray-app prepare` makes one"):
        PairStore.open(where)
    finish(where, source, done, BOTH, 0.0)
    there, local = open_storage(where), {path.name: path.read_bytes() for path in small_store.iterdir()}
    assert there.listdir() == set(local), "the scratch folder is gone"
    assert {name: there.read(name) for name in local} == local
    with pytest.raises(StoreError, match="s3://bucket/deep/er/s already holds a complete pair store"):
        claim_store(where, source, source.tasks(), BOTH)


def test_one_process_at_a_time_builds_a_store_in_a_bucket(s3: S3, tmp_path: Path) -> None:
    where = s3.uri("bucket/claimed")
    claim_folder(open_storage(where))
    with sole_builder(where), pytest.raises(StoreError, match=r"claimed/\.prepare is driven by process \d+ on "):
        sole_builder(where).__enter__()
    np.savez(tmp_path / "a.npz", event=np.ones((3, 2)), target=np.ones((3, 2)))
    assert cli.run(["prepare", "arrays", str(tmp_path / "a.npz"), "--out", where]) == 0
    assert SCRATCH not in open_storage(where).listdir()


def test_commands_read_and_write_it_by_its_uri(s3: S3, small_store: Path) -> None:
    where = s3.uri("bucket/cluster")
    result = prepare(NumpySource(), PrepareFlags(out=where, num_workers=2), SMALL)
    local = PairStore.open(small_store)
    assert result["store"] == where, "whole, so that it can be given to the next command"
    assert result["fingerprint"] == local.fingerprint
    store = PairStore.open(where)
    store.verify()
    rows = np.array([70, 3, 41])
    for mine, theirs in zip(store.read_rows(rows), local.read_rows(rows), strict=True):
        assert np.array_equal(mine, theirs)
    assert (
        run_inspect(InspectConfig(store=where))["before"] == run_inspect(InspectConfig(store=small_store))["before"]
    )
    for batch in pairs_dataset(store, rows).iter_batches(batch_size=None, batch_format="pyarrow"):
        positions, event, _ = to_arrays(batch, store)
        assert np.array_equal(event, local.read_rows(positions)[0])


def test_a_damaged_or_missing_object_is_found_and_named(s3: S3) -> None:
    where, source = s3.uri("bucket/damaged"), NumpySource(num_sequences=2)
    claim_store(where, source, source.tasks(), BOTH)
    finish(where, source, [build_task(source, task, where, BOTH) for task in source.tasks()], BOTH, 0.0)
    there = open_storage(where)
    whole = there.read("drive_0001.parquet")
    there.write("drive_0001.parquet", whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(StoreError, match=r"s3://bucket/damaged/drive_0001\.parquet is damaged"):
        PairStore.open(where).verify()
    there.delete("drive_0001.parquet")
    with pytest.raises(StoreError, match=r"drive_0001\.parquet is damaged: the file is missing"):
        PairStore.open(where)
    there.delete(MANIFEST)
    with pytest.raises(StoreError, match="no finished pair store"):
        PairStore.open(where)


# --- a server that fails ---


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "broken"])
def test_a_server_that_fails_for_a_while_is_waited_for(
    s3: S3, how: str, small_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where, answer, gate = s3.uri(f"bucket/{how}"), {}, tmp_path / "gate"
    flags = PrepareFlags(out=where, num_workers=2, storage_timeout_s=60)

    def run() -> None:
        answer.update(prepare(gated_source(gate), flags, SMALL))

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(s3, how, 2)
    if how == "killed":
        s3.kill()
        gate.touch()
        time.sleep(2)
        s3.start()
    else:  # the file system's own tries may bridge a short outage of the connection, but not this
        s3.refused.unlink(missing_ok=True)
        s3.broken.touch()
        gate.touch()
        while not s3.refused.exists():
            assert thread.is_alive()
            time.sleep(0.05)
        time.sleep(12)
        s3.broken.unlink()
    thread.join(400)
    assert answer["fingerprint"] == PairStore.open(small_store).fingerprint
    assert (answer["pairs"], answer["rejected"]) == (72, 0)
    PairStore.open(where).verify()
    if how == "broken":
        printed = capfd.readouterr().err
        assert f"s3://bucket/{how} does not answer; trying again for 60 s" in printed
        assert f"s3://bucket/{how} answers again" in printed


@pytest.mark.slow
def test_a_server_that_stays_away_ends_it_with_what_is_done_intact(s3: S3, small_store: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    where, source = s3.uri("bucket/away"), gated_source(gate)
    flags = PrepareFlags(out=where, num_workers=2, storage_timeout_s=1)
    errors: list[StoreError] = []

    def run() -> None:
        with pytest.raises(StoreError) as caught:
            prepare(source, flags, SMALL)
        errors.append(caught.value)

    thread = threading.Thread(target=run)
    thread.start()
    done = wait_for(s3, "away", 2)
    s3.kill()
    gate.touch()
    thread.join(400)
    s3.start()  # other tests use it, whatever comes of this one
    printed = str(errors[0])
    assert "s3://bucket/away/" in printed
    assert re.search(r"\d+ tries in \d+ s failed", printed)
    assert "Finished files stay; continue with: ray-app" in printed
    assert errors[0].exit_code == 2
    kept = {key: open_storage(s3.uri("bucket")).read(key) for key in done}
    result = prepare(source, flags, SMALL)
    assert result["pairs_reused"] >= 12 * len(done)
    assert result["fingerprint"] == PairStore.open(small_store).fingerprint
    assert kept == {key: open_storage(s3.uri("bucket")).read(key) for key in done}


def test_a_bucket_that_is_missing_or_denies_is_reported_before_work_starts(
    s3: S3, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["prepare", "scenes", "--num-pairs", "2", "--num-sequences", "2", "--out"]
    assert cli.run([*words, s3.uri("none/s")]) == 2
    assert "error: s3://none/s" in (printed := capfd.readouterr().err)
    assert "Create the bucket, or name another." in printed
    assert "started Ray" not in printed
    with pytest.raises(StoreError, match=r"s3://none/s .*Create the bucket"):
        PairStore.open(s3.uri("none/s"))
    s3.ask("POST", "/moto-api/reset-auth", b"0")  # from now on the server knows no user
    try:
        assert cli.run([*words, s3.uri("bucket/denied")]) == 2
        with pytest.raises(StoreError, match=r"s3://bucket/denied.*The credentials of this environment"):
            PairStore.open(s3.uri("bucket/denied"))
    finally:
        s3.ask("POST", "/moto-api/reset-auth", b"1000000")
    printed = capfd.readouterr().err
    assert "The credentials of this environment are not known there." in printed
    assert "testing" not in printed, "neither key is printed"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["prepare scenes --num-pairs 2 --num-sequences 2", "train --store {store}"])
def test_a_bucket_that_may_only_be_read_is_reported_before_work_starts(
    s3: S3, small_store: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    there = s3.uri("bucket/read-only")
    s3.read_only.touch()
    try:
        assert cli.run([*command.format(store=small_store).split(), "--out", there]) == 2
    finally:
        s3.read_only.unlink()
    printed = capfd.readouterr().err.strip().splitlines()[-1]
    assert "error: s3://bucket/read-only/" in printed
    assert "cannot be written" in printed
    assert printed.endswith("The credentials of this environment do not allow it.")
    assert not open_storage(there).exists()


def test_an_answer_that_is_wrong_for_too_long_is_an_error_with_the_number_of_tries(s3: S3) -> None:
    printed: list[str] = []
    there = open_storage(s3.uri("bucket/wrong"), 8).with_logger(printed.append)
    s3.broken.touch()
    try:
        with pytest.raises(StoreError, match=r"wrong/x cannot be written: \d+ tries in \d+ s failed"):
            there.write("x", b"1")
    finally:
        s3.broken.unlink()
    assert len(printed) == 1
    there.write("x", b"1")
    assert there.read("x") == b"1"


def test_that_a_file_is_missing_is_an_answer_too_after_an_outage(s3: S3) -> None:
    printed: list[str] = []
    there = open_storage(s3.uri("bucket/missing"), 60).with_logger(printed.append)
    s3.broken.touch()
    repair = threading.Timer(8.0, s3.broken.unlink)
    repair.start()
    with pytest.raises(FileNotFoundError):
        there.read("x")
    repair.join()
    assert [line.partition(";")[0].partition(",")[0] for line in printed] == [
        "s3://bucket/missing does not answer",
        "s3://bucket/missing answers again",
    ]


# --- names ---


def test_what_a_place_is_called() -> None:
    assert isinstance(open_storage("s3://bucket/a"), RemoteDir)
    assert str(open_storage("s3://bucket/a/?region=eu-west-1")) == "s3://bucket/a"
    assert open_storage("file:///a%20b") == LocalDir(Path("/a b"))
    assert open_storage("a") == LocalDir(Path.cwd() / "a")
    assert absolute("a") == str(Path.cwd() / "a")
    assert absolute("s3://bucket/a?x=1") == "s3://bucket/a?x=1"
    with pytest.raises(ConfigError, match="one slash"):
        open_storage(Path("s3://bucket/a"))
    with pytest.raises(ConfigError) as caught:
        open_storage("s3://me:secret@bucket/a")
    assert "secret" not in str(caught.value)
    with pytest.raises(StoreError, match=r"nonsense://x cannot be listed.*Name a folder"):
        open_storage("nonsense://x").listdir()
    with pytest.raises(StoreError, match="Unexpected query parameter"):
        open_storage("s3://bucket/a?what=1").listdir()


def test_a_place_that_is_sent_to_a_worker_carries_no_credentials(s3: S3) -> None:
    there = open_storage(s3.uri("bucket/x"))
    assert not there.exists()  # it is connected now
    assert b"testing" not in pickle.dumps(there)


def test_both_slashes_live_through_flags_yaml_and_json(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"store": "s3://bucket//s?region=x", "out": tmp_path / "run"}
    cfg = TrainConfig(**settings)
    assert TrainConfig.model_validate_json(cfg.model_dump_json()).store == settings["store"]
    (tmp_path / "c.yaml").write_text(json.dumps({"store": settings["store"], "out": str(settings["out"])}))
    command = cli.COMMANDS["train"]
    assert cli.parse("train", command, tmp_path / "c.yaml", []) == cfg
    assert cli.parse("train", command, None, ["--store", settings["store"], "--out", str(settings["out"])]) == cfg
