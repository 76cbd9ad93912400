"""Parts of a sweep, without Ray: its file, its proposals, its event logs."""

import io
import json
import os
import pty
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps import sized, spec_file

from ray_app import cli
from ray_app.cluster.resources import ClusterInfo
from ray_app.commands.train.shared_dataset import baselines_of
from ray_app.commands.tune.command import confirm_estimate, new_sweep_spec
from ray_app.commands.tune.estimate import Estimate, MemoryNeed, kept_share, largest, max_concurrent
from ray_app.commands.tune.search import Budget
from ray_app.commands.tune.searchers import TrialRecord, draw, propose
from ray_app.commands.tune.spec import Choice, Range, describe_space, read_spec, space_of, train_config
from ray_app.commands.tune.state import SweepState
from ray_app.commands.tune.sweep_dir import (
    SweepDir,
    Trial,
    active_seconds,
    best_of,
    pareto_front,
    scheduler_metric,
    scores,
    trial_name,
)
from ray_app.commands.tune.trial import give_up_reason
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.evaluation import AlignmentEvaluator, Baselines, derangement
from ray_app.core.metrics import AlignmentCounts
from ray_app.errors import ConfigError, ResourceError, StoreError
from ray_app.runs.event_log import EventLog, entries
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "tune_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_sweep_that_is_shipped_can_be_read_and_says_what_it_is_for(path: Path) -> None:
    spec = read_spec(path, {})
    assert space_of(spec)
    header = path.read_text().partition("\nstore:")[0]
    assert all(word in header for word in ("cost", "command", "measured")), "purpose, cost, command, measured outcome"


def test_the_shipped_sweeps_are_there() -> None:
    assert {path.stem for path in CONFIGS} >= {"smoke", "lightweight", "strategies", "durations", "tokens", "losses"}


def test_every_strategy_but_the_widest_and_every_loss_is_in_a_shipped_space() -> None:
    spaces = [space_of(read_spec(path, {})) for path in CONFIGS]
    strategies = {each for space in spaces if "strategy" in space for each in space["strategy"].bounds}
    assert strategies == set(STRATEGIES) - {"linear"}, "it would have 22.7 billion weights on images"
    losses = {name for name in TrainConfig.model_fields if name.endswith("_weight")}
    assert losses <= {name for space in spaces for name in space}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"spce": {}}, "unknown key 'spce'"),
        ({"space": {}}, "the space is empty"),
        ({"space": {"hidden": [1]}}, "'hidden' is not a setting of `ray-app train`"),
        ({"space": {"hidden_dim": []}}, "has no values"),
        ({"space": {"hidden_dim": 8}}, "must be a list of values"),
        ({"space": {"learning_rate": {"log": [0.1, 0.01]}}}, "is not a range"),
        ({"space": {"learning_rate": {"log": ["1e-4", 0.01]}}}, "1.0e-4 is a number in YAML"),
        ({"space": {"strategy": ["lightweight", "transformer"]}}, "strategy: .*transformer"),
        ({"space": {"dropout": {"uniform": [0.0, 1.5]}}}, "dropout: .*less than 1"),
        ({"space": {"seed": [1, 2]}}, "luck"),
        ({"base": {"out": "x"}}, "a key of its own"),
        ({"base": {"hidden_dim": 8}}, "under both"),
        ({"base": {"epochs": 8}}, "'epochs' is not a setting"),
        ({"search_alg": "grid", "space": {"dropout": {"uniform": [0.0, 0.5]}}}, "needs lists"),
        ({"search_alg": "bohb"}, "search_alg: .*'grid', 'random' or 'optuna'"),
        ({"scheduler": "pbt"}, "scheduler: .*'none' or 'asha'"),
        ({"max_trials": 0}, "max_trials"),
        ({"space": {"rank": [4, 8]}, "base": {"strategy": "lightweight"}}, "rank changes nothing in lightweight,"),
        ({"space": {"patch": [4, 8], "strategy": ["lightweight", "lowrank"]}}, "patch changes nothing in light"),
        ({"space": {"depth": [1, 2]}, "base": {"strategy": "linear"}}, "depth changes nothing in linear"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(lines: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_spec(spec_file(tmp_path, **lines), {})


def test_a_sweep_without_a_store_says_how_to_name_one(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("space: {hidden_dim: [8]}\n")
    with pytest.raises(ConfigError, match="--store stores/scenes"):
        read_spec(path, {})
    assert read_spec(path, {"store": "A", "out": "B"}).store == str(Path("A").absolute())
    for asked in (False, True):
        assert new_sweep_spec(TuneConfig(file=path, store="A", out="B", use_gpu=asked)).use_gpu == asked


def test_any_setting_of_train_may_be_searched(tmp_path: Path) -> None:
    space = {"mse_space": ["raw", "unit"], "plateau_patience": [1, 2], "durations": [["1s"], ["1s", "2s"]]}
    spec = read_spec(spec_file(tmp_path, space=space), {})
    cfg = train_config(spec, {"durations": ["1s", "2s"], "mse_space": "unit"}, tmp_path)
    assert (cfg.durations, cfg.mse_space) == (("1s", "2s"), "unit")


def test_a_setting_that_one_adapter_of_the_space_has_may_be_searched(tmp_path: Path) -> None:
    for space in ({"depth": [1, 2]}, {"rank": [4, 8], "init": ["random", "pca"]}):
        assert read_spec(spec_file(tmp_path, space=space), {})
    assert read_spec(spec_file(tmp_path, space={"patch": [4, 8], "strategy": ["conv", "lightweight"]}), {})


SPACE = {
    "hidden_dim": Range(8, 64, log=True, step=None, integer=True),
    "dropout": Range(0.0, 0.5, log=False, step=0.1, integer=False),
    "strategy": Choice(("lightweight", "bottleneck")),
}


def test_a_grid_is_every_combination_once_in_one_order() -> None:
    space = {"a": Choice((1, 2)), "b": Choice(("x", "y", "z"))}
    tried: list[TrialRecord] = []
    while setting := propose("grid", space, 0, tried):
        tried.append(TrialRecord(setting, "running"))
    assert [tuple(trial.setting.values()) for trial in tried] == [(a, b) for a in (1, 2) for b in ("x", "y", "z")]


def test_random_draws_stay_in_the_space_and_never_repeat_a_choice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        hidden, dropout = draw(SPACE["hidden_dim"], rng), draw(SPACE["dropout"], rng)
        assert isinstance(hidden, int)
        assert 8 <= hidden <= 64
        assert min(abs(dropout - k / 10) for k in range(6)) < 1e-9
    space, tried = {"a": Choice((1, 2)), "b": Choice((3, 4))}, []
    while setting := propose("random", space, 7, tried):
        tried.append(TrialRecord(setting, "running"))
    assert sorted(tuple(trial.setting.values()) for trial in tried) == [(1, 3), (1, 4), (2, 3), (2, 4)]


def test_optuna_proposes_the_same_after_the_same_record_and_learns_from_it() -> None:
    """Twenty trials that tell it that a wide layer is good: it then proposes wider ones than a random draw does."""

    def record(n: int) -> list[TrialRecord]:
        tried: list[TrialRecord] = []
        for _ in range(n):
            setting = propose("optuna", SPACE, 0, tried)
            assert setting is not None
            tried.append(TrialRecord(setting, "finished", (setting["hidden_dim"] / 64,), 3))
        return tried

    first = record(20)
    assert record(20) == first
    later = [propose("optuna", SPACE, seed, first)["hidden_dim"] for seed in range(8)]  # type: ignore[index]
    drawn = [propose("random", SPACE, seed, first)["hidden_dim"] for seed in range(8)]  # type: ignore[index]
    assert np.mean(later) > np.mean(drawn) + 5
    states = [TrialRecord(first[0].setting, "stopped", (0.1,), 1), TrialRecord(first[1].setting, "failed")]
    assert propose("optuna", SPACE, 0, [*states, TrialRecord(first[2].setting, "running")])
    two = [TrialRecord(trial.setting, "finished", (*trial.values, 1000.0), 3) for trial in first]
    assert propose("optuna", SPACE, 0, two, ("maximize", "minimize"))


def trial(index: int, objective: float | None, parameters: int, **more: Any) -> Trial:
    return Trial(
        index, f"t{index}", {}, parameters, objective=objective, status=more.pop("status", "finished"), **more
    )


def test_of_equal_trials_the_one_with_fewer_parameters_is_best_and_a_failed_one_never_is() -> None:
    trials = [trial(0, 0.5, 30), trial(1, 0.5, 20), trial(2, 0.5, 20), trial(3, 0.9, 1, status="failed")]
    assert best_of([*trials, trial(4, None, 1)]) is trials[1]
    assert best_of(trials[3:]) is None
    assert [t.index for t in pareto_front([*trials, trial(5, 0.4, 5), trial(6, 0.3, 9)], "parameters")] == [1, 5]


def test_a_trials_name_is_its_number_and_its_setting() -> None:
    assert trial_name(7, {"a": 1, "b": 2}) == trial_name(7, {"b": 2, "a": 1})
    assert trial_name(7, {"a": 1}) != trial_name(7, {"a": 2})
    assert trial_name(7, {"a": 1}).startswith("trial_0007-")
    assert describe_space({"a": 0.12345, "b": "x", "c": ["1s"]}) == 'a 0.123, b x, c ["1s"]'


def epoch(n: int, loss: float, rate: float, cos: float = 0.0) -> dict[str, Any]:
    return {
        "kind": "epoch",
        "epoch": n,
        "val": {"loss": loss, "cosine_accept_rate": {"0.80": rate}, "lift": rate - 0.5, "cos_sim_mean": cos},
    }


def test_a_trial_counts_with_its_best_checkpoint_not_with_its_luckiest_epoch() -> None:
    lines = [epoch(1, 3.0, 0.2), epoch(2, 1.0, 0.4), epoch(3, 2.0, 0.9)]
    best = scores(lines, "cosine_accept_rate_0.80")
    assert (best["objective"], best["best_epoch"], best["epochs"]) == (0.4, 2, 3)
    assert scores(lines, "lift")["objective"] == pytest.approx(-0.1)
    assert scores([], "lift") == {}


@pytest.mark.parametrize("objective", ["cosine_accept_rate_0.80", "lift"])
def test_under_way_the_mean_cosine_decides_between_equals_and_never_against_one_pair_more(objective: str) -> None:
    def metric(rate: float, cos: float) -> float:
        return scheduler_metric([epoch(1, 1.0, rate, cos), epoch(2, 2.0, 1.0, 1.0)], objective)

    assert metric(0.4, 0.71) > metric(0.4, 0.70)
    assert metric(0.4 + 1 / 100_000, -1.0) > metric(0.4, 1.0)


def sweep_of_one_trial(small_store: Path, tmp_path: Path) -> tuple[SweepDir, PairStore, Trial]:
    """Its driver was killed when it had started the first."""
    spec = sized(tmp_path, small_store, out=str(tmp_path / "sweep"))
    sweep, store = SweepDir(Path(spec.out)), PairStore.open(small_store)
    settings = spec.model_dump(mode="json", exclude_unset=True)
    sweep.create({"name": "s", "key": "k", "spec": settings, "store_fingerprint": store.fingerprint})
    with EventLog(sweep.path) as log:
        started = SweepState(sweep, log, {"all": store}, {}).next_trial()
    assert started is not None
    return sweep, store, started


def test_a_trial_that_ended_as_its_driver_was_killed_is_not_tried_again(small_store: Path, tmp_path: Path) -> None:
    """Its own event log has an end, the sweep's does not know of it yet."""
    sweep, store, started = sweep_of_one_trial(small_store, tmp_path)
    with EventLog(sweep.run(started.name).path) as log:
        log.write("run_ended", status="FINISHED", artifacts=None, time=time.time())
    with EventLog(sweep.path) as log:
        record = SweepState(sweep, log, {"all": store}, {})
        assert record.trials[started.name].status == "finished"
        following = record.next_trial()
        assert following is not None
        assert following.name != started.name


def test_time_between_attempts_is_not_counted() -> None:
    kinds = [("workers_started", 0), ("step", 3), ("workers_started", 10), ("step", 12), ("run_ended", 14)]
    assert active_seconds([{"kind": kind, "time": float(at)} for kind, at in kinds]) == 3 + 4


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("attempt", True),
        ("attempt attempt", False),
        ("attempt 1 2 attempt", False),
        ("attempt 1 attempt 2", True),
        ("attempt error attempt error", True),
        ("attempt error attempt", True),
        ("lost lost lost", True),
        ("attempt 1 lost", True),
        ("lost 1 attempt", True),
        ("attempt 1 lost attempt", False),
        ("lost 1 attempt attempt", False),
    ],
)
def test_a_process_that_dies_twice_at_one_step_is_not_started_again(words: str, again: bool) -> None:
    """`lost`: an attempt on a node that has gone since."""
    kinds = {
        "attempt": {"kind": "workers_started", "node": "here"},
        "lost": {"kind": "workers_started", "node": "gone"},
        "error": {"kind": "exception"},
    }
    lines = [kinds.get(word) or {"kind": "step", "global_step": int(word)} for word in words.split()]
    assert (give_up_reason(lines, {"gone"}) is None) == again


def test_baselines_and_lift_are_those_of_the_one_evaluator(small_store: Path) -> None:
    store = PairStore.open(small_store)
    split = split_pairs(store.index, TrainConfig(store=small_store, out=small_store).split_config)
    event, target = store.read_rows(split.val)
    mean = torch.from_numpy(store.read_rows(split.train)[1].mean(axis=0) / 255).float()
    baselines = baselines_of(store, split, event, target, mean)

    class Same(torch.nn.Module):
        def forward(self, event_BE: torch.Tensor) -> torch.Tensor:
            return event_BE

    evaluator = AlignmentEvaluator(Same().eval(), mean, 1 / 255, 1 / 255, images=True)  # type: ignore[arg-type]
    evaluator.add(torch.from_numpy(event), torch.from_numpy(target))
    sequences = store.index.sequence[split.val].tolist()
    result = evaluator.result(sequences, np.full(len(event), -1))
    for name, counts in baselines.fixed.items():
        assert counts.accept_rate() == float((result.baselines[name] > 0.8).mean())
    assert np.array_equal(baselines.others, derangement(sequences, 0))
    shuffled = AlignmentCounts.of(result.baselines["shuffled"])
    lift = baselines.lift(AlignmentCounts.of(result.after), shuffled)
    assert lift["lift"] == pytest.approx(result.lift())
    assert lift["baselines"]["shuffled"] == shuffled.accept_rate()


def test_a_constant_that_is_accepted_has_no_lift_over_itself_shuffled() -> None:
    half = AlignmentCounts.of(np.array([0.9, 0.1]))
    nothing = AlignmentCounts.of(np.array([0.1, 0.1]))
    assert Baselines({"white": nothing}, np.array([1, 0])).lift(half, half)["lift"] == 0.0


def test_the_error_of_a_space_beyond_the_memory_names_its_largest_setting(small_store: Path, tmp_path: Path) -> None:
    space = {"hidden_dim": {"log": [8, 4_000_000]}, "strategy": ["linear", "bottleneck"]}
    spec = sized(tmp_path, small_store, space=space)
    most = largest(spec, PairStore.open(small_store))
    assert most.setting == {"hidden_dim": 4_000_000, "strategy": "bottleneck"}
    info = ClusterInfo(cpus=4, gpus=0, memory_bytes=8 * 2**30, node_cpus=(4,))
    with pytest.raises(
        ResourceError, match=r"hidden_dim 4000000, strategy bottleneck has .* the largest node has 8.0 GiB"
    ):
        max_concurrent(spec, info, {}, most)
    bases = sized(tmp_path, small_store, space={"rank": [4, 8]}, base={"strategy": "lowrank"})
    assert largest(bases, PairStore.open(small_store)).buffers == 4 * 2 * (768 + 768 * 8 + 8)
    small = MemoryNeed(1000, 0, {"hidden_dim": 8})
    assert max_concurrent(spec, info, {}, small) == 4
    assert max_concurrent(spec.model_copy(update={"max_concurrent_trials": 2}), info, {}, small) == 2
    assert max_concurrent(spec, info, {}, MemoryNeed(2**28, 0, {})) == 1, "memory for one at a time"
    assert max_concurrent(spec, info, {}, MemoryNeed(0, 3 * 2**30, {})) == 2, (
        "other tensors count as well as parameters"
    )
    nodes = replace(info, node_cpus=(1, 3), node_memory_bytes=(5 * 2**30, 4 * 2**30))
    assert max_concurrent(spec, nodes, {}, small) == 1 + 3
    assert max_concurrent(spec, nodes, {}, MemoryNeed(0, 2 * 2**30, {})) == 1 + 1, "each node holds one of 3 GiB"
    with pytest.raises(ResourceError, match=r"5\.0 GiB of other tensors.* the largest node has 5\.0 GiB"):
        max_concurrent(spec, nodes, {}, MemoryNeed(0, 5 * 2**30, {}))
    with pytest.raises(ResourceError, match="wants 1 workers of 8 CPUs"):
        max_concurrent(spec.model_copy(update={"cpus_per_worker": 8.0}), info, {}, small)
    with pytest.raises(ResourceError, match="wants 1 GPUs"):
        max_concurrent(spec.model_copy(update={"use_gpu": True}), info, {}, small)


@pytest.mark.parametrize(("answer", "begins"), [("y", True), ("n", False), ("", False)])
def test_an_estimate_above_a_limit_is_asked_about_on_a_terminal(
    answer: str,
    begins: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    spec = read_spec(spec_file(tmp_path, max_hours=1.0, max_gpu_hours=2.0, use_gpu=True), {})
    cfg = TuneConfig(file=tmp_path / "sweep.yaml")
    estimate = Estimate(4, 1, hours=0.9, hours_expected=0.5, gpu_hours=3.0, final_hours=0.25, measured="")
    master, slave = pty.openpty()
    with open(slave) as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        os.write(master, f"{answer}\n".encode())
        if begins:
            confirm_estimate(cfg, spec, estimate)
        else:
            with pytest.raises(ConfigError, match="nothing was started"):
                confirm_estimate(cfg, spec, estimate)
    os.close(master)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match=r"3 GPU hours is above max_gpu_hours 2.*--yes"):
        confirm_estimate(cfg, spec, estimate)
    capfd.readouterr()
    confirm_estimate(cfg, spec, replace(estimate, gpu_hours=2.0))
    assert "for 4 trials, 1 at a time, then about 0.25 h for 3 seeds of the winner" in capfd.readouterr().err
    confirm_estimate(cfg.model_copy(update={"final": False}), spec, replace(estimate, gpu_hours=2.0))
    assert "winner" not in capfd.readouterr().err


def test_hours_and_gpu_hours_end_the_search(tmp_path: Path) -> None:
    """GPU hours are those of all trials, one GPU for each worker; of earlier starts, too."""
    spec = read_spec(spec_file(tmp_path, max_hours=1.0, max_gpu_hours=2.0, use_gpu=True, num_workers=2), {})
    assert Budget(spec, used_s=0.0, trial_s=3590.0).spent is None
    assert "--max-gpu-hours 2 are used up" in (Budget(spec, used_s=0.0, trial_s=3600.0).spent or "")
    assert "--max-hours 1 are used up" in (Budget(spec, used_s=3600.0, trial_s=0.0).spent or "")
    on_cpus = Budget(spec.model_copy(update={"use_gpu": False}), used_s=0.0, trial_s=1e6)
    assert on_cpus.spent is None
    running = Budget(spec, used_s=0.0, trial_s=3600.0 - 1e-3)
    running.started("a")
    time.sleep(0.01)
    assert running.stop_all()


def test_what_asha_keeps_by_hand(tmp_path: Path) -> None:
    """Nine epochs, thirds at 1 and 3: 1 + 2/3 + 6/9 of 9."""
    spec = read_spec(spec_file(tmp_path, base={"num_epochs": 9}), {})
    assert kept_share(spec) == pytest.approx((1 + 2 / 3 + 6 / 9) / 9)
    assert kept_share(spec.model_copy(update={"scheduler": "none"})) == 1.0


def test_what_is_no_sweep_or_lacks_its_record_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--resume", "--watch"):
        assert cli.run(["tune", flag, str(tmp_path)]) == 2
        assert "is not the folder of a sweep" in " ".join(capfd.readouterr().err.split())
    sweep = SweepDir(tmp_path / "s")
    sweep.create({"name": "s", "key": "k", "spec": {}, "store_fingerprint": "f"})
    (sweep.path / "events.jsonl").unlink()
    assert cli.run(["tune", "--resume", str(sweep.path)]) == 2
    assert "is missing: it is the record of what was tried" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(StoreError, match=r"holds a sweep already; .*--resume"):
        sweep.create({})
    assert cli.run(["tune"]) == 2
    assert "exactly one of FILE, --resume and --watch" in " ".join(capfd.readouterr().err.split())


def test_a_sweep_with_a_driver_is_not_resumed_by_another_and_stays_as_it_is(
    small_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ray_app.commands.tune.sweep_dir.SWEEP_HANDOVER_S", 0.1)
    sweep = SweepDir(tmp_path / "s")
    settings = sized(tmp_path, small_store, out=str(sweep.path)).model_dump(mode="json", exclude_unset=True)
    sweep.create({"name": "s", "key": "k", "spec": settings, "store_fingerprint": "f"})
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
    sweep, store, started = sweep_of_one_trial(small_store, tmp_path)
    run = sweep.run(started.name).path
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
    assert [trial.status for trial in sweep.trials()] == ["running" if left == "events.jsonl" else "waiting"]
    with EventLog(sweep.path) as log:
        again = SweepState(sweep, log, {"all": store}, {}).next_trial()
    assert again is not None
    assert again.name == started.name
    assert [line["kind"] for line in entries(run)] == ["run_started"]
    assert sweep.run(started.name).metadata()["store_fingerprint"] == store.fingerprint


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
