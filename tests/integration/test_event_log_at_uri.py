"""The event log of a run at a URI: one writer, one driver, readers that see it grow, signals both ways."""

import itertools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3_process import S3
from small_saves import save
from waiting import wait_until

from ray_app.errors import CheckpointError, StoreError
from ray_app.runs import mirror, succession
from ray_app.runs.event_log import EVENT_LOG, EventLog, entries, require_latest_driver, tail
from ray_app.runs.run_dir import RunDir, open_run
from ray_app.runs.succession import Lease, Successors, TakenOver
from ray_app.store import scratch
from ray_app.store.filesystem import RemoteDir


def lines_of(run: RunDir) -> list[int]:
    return [line["n"] for line in entries(run.path)]


def logs(run: RunDir) -> Successors:
    assert run.mirror.remote
    return Successors(run.mirror.remote, EVENT_LOG)


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


def test_a_push_at_the_moment_at_which_its_own_process_takes_the_log_again_is_no_takeover(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial of a sweep lends its event log at each report; the background thread may push at any moment of that."""
    run, write = copy("again"), RemoteDir.write
    errors: list[Exception] = []

    def push() -> None:
        try:
            run.mirror.push()
        except StoreError as error:
            errors.append(error)

    pushes: list[threading.Thread] = []

    def write_slowly(self: RemoteDir, name: str, data: bytes) -> None:
        if not data:  # it joins
            pushes.append(threading.Thread(target=push))
            pushes[-1].start()
            pushes[-1].join(0.5)
        write(self, name, data)

    with run.event_log() as log:
        log.write("note", n=0)
        with monkeypatch.context() as patch:
            patch.setattr(RemoteDir, "write", write_slowly)
            with run.released(log):
                pass
        pushes[0].join()
        log.write("note", n=1)
    assert not errors
    reader = copy("again")
    reader.refresh()
    assert lines_of(reader) == [0, 1]


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


@pytest.mark.parametrize("usual", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_driver_that_another_has_followed_is_interrupted_and_sends_no_more_signals(
    copy: Callable[[str], RunDir], monkeypatch: pytest.MonkeyPatch, usual: Any
) -> None:
    monkeypatch.setattr(succession, "SYNC_INTERVAL_S", 0.05)
    run = copy("lost")

    def drive() -> None:
        with run.exclusive({}):
            assert run.mirror.remote
            Successors(run.mirror.remote, mirror.DRIVER_LEASE).join(b"{}")
            with pytest.raises(KeyboardInterrupt):
                time.sleep(60)
            run.stop_file.touch()
            run.mirror.push_signals("stop")
            with run.event_log():
                raise AssertionError("it writes no more")

    before = signal.signal(signal.SIGINT, usual)  # a script's background process ignores it
    try:
        with pytest.raises(TakenOver, match="/there/lost continues in another process"):
            drive()
    finally:
        signal.signal(signal.SIGINT, before)
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
    refusals = [answer for answer in answers if answer is not True]
    assert len(refusals) == 3, answers
    # Looked after the lease was taken, took it a moment too late, or found the run started.
    words = ("is driven by process", "continues in another process", "already holds something")
    assert all(any(said in answer for said in words) for answer in refusals), answers


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
