"""What `prepare` says where there is no terminal: a line now and then, with speeds and the time left."""

import pytest

from ray_app.commands.prepare import progress as prepare_progress
from ray_app.commands.prepare.progress import SECONDS_PER_LINE, PrepareProgress
from ray_app.commands.prepare.store_builder import BuiltTask, RejectedLine
from ray_app.store.manifest import PartRecord


class Clock:
    """In place of the module `time`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(prepare_progress, "time", found)
    return found


def built(pairs: int, rejected: int, windows: int, events_drawn: int) -> BuiltTask:
    return BuiltTask(
        task="t",
        part=PartRecord(name="t.parquet", pairs=pairs, bytes=1, sha256="0" * 64),
        rejected=(RejectedLine(input="s", position="window", reason="made to fail"),) * rejected,
        windows=windows,
        events_drawn=events_drawn,
    )


def test_a_line_shows_windows_and_events_a_second_and_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with PrepareProgress(1_100) as progress:
        clock.now += 10
        progress.add(built(100, 0, 100, 900_000_000), True, "")  # kept from an earlier start: no work of this one
        assert capsys.readouterr().err == ""
        clock.now += SECONDS_PER_LINE
        progress.add(built(198, 2, 50, 100_000_000), False, "")
        # in 40 s: 50 windows and 100 million events; 800 pairs are left at 200 in 40 s
        assert capsys.readouterr().err == (
            "300 of 1,100 pairs, 1.25 windows/s, 2.5 million events/s, 160 s left, 2 rejected\n"
        )
        clock.now += SECONDS_PER_LINE - 1
        progress.add(built(100, 0, 25, 50_000_000), False, "")
        assert capsys.readouterr().err == ""
        clock.now += 31
        progress.add(built(100, 0, 25, 50_000_000), False, "")
        assert capsys.readouterr().err.startswith(
            "500 of 1,100 pairs, 1.00 windows/s, 2.0 million events/s, 150 s left"
        )


def test_without_event_counts_nothing_is_said_of_them(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with PrepareProgress(20) as progress:
        clock.now += SECONDS_PER_LINE
        progress.add(built(10, 0, 10, 0), False, "")
        assert capsys.readouterr().err == "10 of 20 pairs, 0.33 windows/s, 30 s left, 0 rejected\n"


def test_what_a_worker_heard_of_the_store_is_printed_at_once(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with PrepareProgress(20) as progress:
        clock.now += 1
        progress.add(built(10, 0, 10, 0), False, "s3://bucket/s does not answer; trying\ns3://bucket/s answers again")
        assert capsys.readouterr().err.splitlines() == [
            "s3://bucket/s does not answer; trying",
            "s3://bucket/s answers again",
        ]
