"""The record of a sweep: who writes it, what a killed driver leaves, what a resume may change. Without Ray."""

import json
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sweeps import created, sized

from ray_app import cli
from ray_app.commands.tune.command import best_trial, require_resumable
from ray_app.commands.tune.context import SweepContext
from ray_app.commands.tune.final import final_result
from ray_app.commands.tune.search import SweepSearcher
from ray_app.commands.tune.sweep_dir import SWEEP, SweepDir
from ray_app.commands.tune.trials import Trial
from ray_app.config.evaluate import PromoteConfig
from ray_app.errors import ConfigError, StoreError, TrainingError
from ray_app.runs.event_log import EventLog, entries


def sweep_of_one_trial(small_store: Path, tmp_path: Path) -> tuple[SweepContext, SweepDir, Trial]:
    """Its driver was killed when it had started the first."""
    sweep = sized(tmp_path, small_store, out=str(tmp_path / "sweep"))
    folder = created(sweep)
    with EventLog(folder.path) as log:
        return sweep, folder, started(SweepSearcher(sweep, folder, log))


def started(searcher: SweepSearcher) -> Trial:
    """The next trial, as Ray Tune starts it."""
    return searcher.suggest("")["trial"].trial


def test_a_trial_that_ended_as_its_driver_was_killed_is_not_tried_again(small_store: Path, tmp_path: Path) -> None:
    """Its own event log has an end, the sweep's does not know of it yet."""
    sweep, folder, first = sweep_of_one_trial(small_store, tmp_path)
    with EventLog(folder.run(first.name).path) as log:
        log.write("run_ended", status="FINISHED", artifacts=None, time=time.time())
    with EventLog(folder.path) as log:
        searcher = SweepSearcher(sweep, folder, log)
        assert searcher.trials[first.name].status == "finished"
        assert started(searcher).name != first.name


def test_reasons_are_grouped_without_their_numbers(small_store: Path, tmp_path: Path) -> None:
    sweep = sized(tmp_path, small_store, out=str(tmp_path / "s"), space={"hidden_dim": [8, 16, 24]})
    folder = created(sweep)
    with EventLog(folder.path) as log:
        searcher = SweepSearcher(sweep, folder, log)
        for reason in ("not finite at step 3", "out of memory", "not finite at step 17"):
            searcher.end(started(searcher).name, "FAILED", reason)
    with pytest.raises(TrainingError, match=r"Failed: 2 times: not finite at step 3; 1 times: out of memory$"):
        best_trial(folder)


def test_where_no_trial_has_finished_an_epoch_the_error_has_the_resume_command(
    small_store: Path, tmp_path: Path
) -> None:
    _, folder, _ = sweep_of_one_trial(small_store, tmp_path)
    with pytest.raises(TrainingError, match=r"no trial of .* has finished an epoch yet; resume with: .*--resume"):
        best_trial(folder)


def test_the_command_that_promotes_the_winner_has_the_split_that_it_was_trained_with(
    small_store: Path, tmp_path: Path
) -> None:
    lines = {"split": "window", "test_share": 0.3, "space": {"durations": [["1s"]], "hidden_dim": [8]}}
    sweep = sized(tmp_path, small_store, out=str(tmp_path / "a sweep"), **lines)
    folder = created(sweep)
    with EventLog(folder.path) as log:
        best = started(SweepSearcher(sweep, folder, log))
        run = f"final/{best.name}/seed_0"
        log.write(
            "final_seed", trial=best.name, seed=0, run=run, test={"accept_rate": 0.5, "lift": 0.1, "try_next": ""}
        )
    final = final_result(folder, best)
    assert final is not None
    _, name, *words = shlex.split(final["promote"])
    promote = cli.parse(name, cli.COMMANDS[name], None, words)
    assert isinstance(promote, PromoteConfig)
    assert promote.run == str(folder.path / run)
    assert (promote.split, promote.test_share, promote.durations) == ("window", 0.3, ("1s",))
    assert final_result(folder, None) is None


def test_a_resumed_sweep_has_its_settings_and_only_its_budget_may_change(small_store: Path, tmp_path: Path) -> None:
    sweep = sized(tmp_path, small_store, out=str(tmp_path / "s"), max_trials=3)
    folder = created(sweep)
    words = ["--resume", str(folder)]
    same, more, other = (
        SweepContext.open(cli.parse("tune", cli.COMMANDS["tune"], None, [*words, *flags]))
        for flags in ([], ["--max-trials", "9"], ["--search-alg", "random"])
    )
    assert same.cfg == sweep.cfg.model_copy(update={"resume": str(folder), "tracking_uri": same.cfg.tracking_uri})
    before = folder.metadata()
    require_resumable(same, folder)
    assert folder.metadata() == before
    require_resumable(more, folder)
    assert folder.config.max_trials == 9
    assert folder.config.resume is None
    with pytest.raises(ConfigError, match="search_alg was 'optuna', is 'random' now; leave that out"):
        require_resumable(other, folder)
    folder.write(SWEEP, json.dumps(before | {"store_fingerprint": "other"}).encode())
    with pytest.raises(StoreError, match="searched on pairs of fingerprint other"):
        require_resumable(same, folder)


def test_what_is_no_sweep_or_lacks_its_record_is_one_sentence(
    small_store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--resume", "--watch"):
        assert cli.run(["tune", flag, str(tmp_path)]) == 2
        assert "is not the folder of a sweep" in " ".join(capfd.readouterr().err.split())
    sweep = created(sized(tmp_path, small_store, out=str(tmp_path / "s")))
    (sweep.path / "events.jsonl").unlink()
    assert cli.run(["tune", "--resume", str(sweep.path)]) == 2
    assert "is missing: it is the record of what was tried" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(StoreError, match=r"holds a sweep already; .*--resume"):
        sweep.create({})
    assert cli.run(["tune"]) == 2
    assert "--resume SWEEP resumes one, --watch SWEEP shows one" in " ".join(capfd.readouterr().err.split())


def test_a_sweep_with_a_driver_is_not_resumed_by_another_and_stays_as_it_is(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray_app.commands.tune.sweep_dir.SWEEP_HANDOVER_S", 0.1)
    sweep = created(sized(tmp_path, small_store, out=str(tmp_path / "s")))
    before = (sweep.path / "sweep.json").read_bytes()
    resume = [
        "tune",
        "--resume",
        str(sweep.path),
        "--max-trials",
        "9",
        "--tracking-uri",
        f"sqlite:///{tmp_path}/m.db",
    ]
    with sweep.exclusive():
        assert cli.run(resume) == 2
    assert "is being written by another process; wait for its end" in " ".join(capfd.readouterr().err.split())
    assert (sweep.path / "sweep.json").read_bytes() == before


@pytest.mark.parametrize("left", ["no folder", "an empty folder", ".run.json.partial", "run.json", "events.jsonl"])
def test_a_trial_whose_driver_was_killed_as_it_started_is_started_again(
    left: str, small_store: Path, tmp_path: Path
) -> None:
    """`left`: what its folder holds last, in the order in which it is made."""
    sweep, folder, first = sweep_of_one_trial(small_store, tmp_path)
    run = folder.run(first.name).path
    assert sorted(path.name for path in run.iterdir()) == ["events.jsonl", "run.json"]
    if left == "events.jsonl":
        (run / left).write_text('{"kind": "sta')
    else:
        (run / "events.jsonl").unlink()
    if left == ".run.json.partial":
        (run / left).write_bytes((run / "run.json").read_bytes()[:9])
    if left not in ("run.json", "events.jsonl"):
        (run / "run.json").unlink()
    if left == "no folder":
        run.rmdir()
    assert [trial.status for trial in folder.trials()] == ["running" if left == "events.jsonl" else "waiting"]
    with EventLog(folder.path) as log:
        assert started(SweepSearcher(sweep, folder, log)).name == first.name
    assert [line["kind"] for line in entries(run)] == ["run_started"]
    assert folder.run(first.name).metadata()["store_fingerprint"] == sweep.fingerprint


def test_of_sweeps_that_begin_in_one_folder_at_one_moment_one_has_it(tmp_path: Path) -> None:
    def claim(n: int) -> int | None:
        try:
            SweepDir(tmp_path / "s").create({"key": n})
        except StoreError:
            return None
        return n

    with ThreadPoolExecutor(8) as pool:
        won = [n for n in pool.map(claim, range(64)) if n is not None]
    assert won == [SweepDir(tmp_path / "s").metadata()["key"]]


def test_hours_are_counted_over_all_starts(tmp_path: Path) -> None:
    sweep = SweepDir(tmp_path / "s")
    sweep.create({})
    with EventLog(sweep.path) as log:
        for kind, at in (
            ("run_started", 0),
            ("trial_created", 5),
            ("run_ended", 60),
            ("run_started", 1000),
            ("trial_created", 1030),
            ("run_started", 2000),
        ):
            log.write(kind, time=float(at))
    assert sweep.used_seconds() == 60 + 30
    assert json.loads((sweep.path / "sweep.json").read_text()) == {}
