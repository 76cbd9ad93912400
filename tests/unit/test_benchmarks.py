"""The benchmark scripts' own functions, at small sizes: a script that cannot be run here still has to work."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import provenance, results_tables
from benchmarks.adapters import comparison, gpu
from benchmarks.data import dsec_drive, prepare_dsec, simulator_noise
from benchmarks.serve.all import PARTS, all_of
from benchmarks.speculative import replay
from benchmarks.train import parallelism, scaling
from ray_app.config.train import TrainConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import STRATEGIES, build_adapter
from ray_app.core.metrics import cos_sim

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_gpu_script_scores_as_the_metrics_do() -> None:
    adapter = build_adapter(AdapterConfig("lightweight", 300, 300, 8), 0).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    event, target = (torch.randint(1, 256, (6, 300), dtype=torch.uint8, generator=generator) for _ in range(2))
    aligned = adapter(event.to(torch.bfloat16) / 255).float()
    found = gpu.scores(adapter, event, target)
    assert torch.allclose(found, cos_sim(aligned, target / 255), atol=0.02)  # bf16 has 8 bits of mantissa
    speed = gpu.throughput(adapter, event, target, 3, torch.device("cpu"), compiled=False)
    assert speed > 0


def test_the_gpu_script_trains() -> None:
    generator = torch.Generator().manual_seed(0)
    event, target = (torch.randint(1, 256, (70, 40), dtype=torch.uint8, generator=generator) for _ in range(2))
    found = gpu.train(event, target, 8, 2, torch.device("cpu"))
    assert found["steps"] == 2 * 3
    assert 0 < found["cos_sim_last_batch"] <= 1


def test_every_setting_of_the_comparison_is_one_of_training_and_one_has_the_loss_of_its_strategy(
    tmp_path: Path,
) -> None:
    runs = {
        name: TrainConfig.model_validate({"store": tmp_path, "out": tmp_path / "run", **settings})
        for name, settings in (comparison.SETTINGS | comparison.TOKENS).items()
    }
    assert {run.strategy for run in runs.values()} == set(STRATEGIES) - {"linear"}, "too wide for images"
    own = [name for name, run in runs.items() if run.next_position_weight]
    assert own == ["token_causal, next"]
    plain = runs["token_causal, spectral"].model_dump(exclude={"next_position_weight"})
    assert runs["token_causal, next"].model_dump(exclude={"next_position_weight"}) == plain


def test_the_script_of_parallelism_gives_every_worker_its_part_of_the_same_batches() -> None:
    whole = list(parallelism.order(3, 0, 1))
    parts = [list(parallelism.order(3, rank, 4)) for rank in range(4)]
    for step, batch in enumerate(whole):
        own = [part[step] for part in parts]
        assert [n for each in own for n in each.positions] == batch.positions.tolist()
        assert [each.first_row for each in own] == [0, 8, 16, 24]
    assert whole[0].positions.tolist() != whole[1].positions.tolist()


def test_one_gpu_is_as_fast_whatever_it_would_divide() -> None:
    by_features, by_pairs = parallelism.by_features(1), scaling.predicted(1)
    assert {key: by_pairs[key] for key in by_features} == by_features


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the script would run in full")
def test_without_a_gpu_the_script_says_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[str, dict] = {}
    monkeypatch.setattr(gpu, "save", lambda name, result: saved.update({name: result}))
    monkeypatch.setattr("sys.argv", ["gpu"])
    gpu.main()
    assert saved["gpu_adapter"]["status"] == "not run"
    assert "CUDA" in saved["gpu_adapter"]["reason"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one committed file, whose results folder `save` writes to."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "code.py").write_text("a = 1\n")
    who = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "code")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(provenance, "RESULTS", results)
    return tmp_path


def test_a_result_names_the_commit_of_its_code_and_another_result_changes_no_code(checkout: Path) -> None:
    for _ in range(2):
        written = json.loads(provenance.save("speed", {"value": 1}).read_text())
        head = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
        assert head.stdout.startswith(written["provenance"]["commit"])
        assert written["value"] == 1


def test_no_result_is_written_from_changed_code(checkout: Path) -> None:
    (checkout / "code.py").write_text("a = 2\n")
    with pytest.raises(SystemExit, match=r"1 tracked files differ from the commit \(code\.py …\).*commit or stash"):
        provenance.save("speed", {"value": 1})
    assert not list((checkout / "benchmarks" / "results").iterdir())


def test_noise_on_flat_grey_is_that_of_the_model() -> None:
    shot = simulator_noise.compare(simulator_noise.SHOT, 128, 48, 10, 0)
    leak = simulator_noise.compare(simulator_noise.LEAK | {"leak_spread": 0.0}, 128, 24, 10, 2)
    assert shot["largest_error"] < 0.03
    assert shot["largest_error_of_positive_share"] < 0.01  # 70,000 events: a standard deviation of 0.002
    assert leak["largest_error"] < 0.01
    assert leak["model_positive_share"] == 1.0


def test_the_model_of_noise_is_worked_by_hand() -> None:
    from ray_app.events.simulator import SimulatorConfig

    exact = SimulatorConfig(sigma=0.0, shot_noise_hz=8.0, leak_rate_hz=3.0, leak_spread=0.0)
    rates = simulator_noise.model(exact, 255)  # the brightest: a quarter of the dark rate
    assert rates.on_hz == pytest.approx(1.0 + 3.0)
    assert rates.off_hz == pytest.approx(1.0)


def test_the_long_drive_is_a_true_sequence_of_the_density_asked_for(tmp_path: Path) -> None:
    from ray_app.sources.dsec.events_file import DsecEvents
    from ray_app.sources.dsec.source import DsecSource
    from ray_app.sources.recorded import WindowingConfig

    files = dsec_drive.DsecFiles(tmp_path, "drive_00")
    files.events.parent.mkdir(parents=True)
    dsec_drive.write_long_events(files.events, dsec_drive.seconds(2, 60_000, 0), 2)
    with DsecEvents(files.events) as events:
        assert len(events) == pytest.approx(120_000, rel=0.02)
        assert events.index(events.t_offset_us + 1_000_000) == pytest.approx(60_000, rel=0.02)
        (part,) = events.parts(0, len(events))
        assert 0.4 < part.p.mean() < 0.6
    times = [dsec_drive.FIRST_FRAME_US + i * 50_000 for i in range(40)]
    files.timestamps.parent.mkdir(parents=True)
    files.timestamps.write_text("".join(f"{t}\n" for t in times))
    files.images.mkdir(parents=True)
    for i in range(40):
        (files.images / f"{i:06d}.png").touch()
    (task,) = DsecSource(tmp_path, WindowingConfig((1_000_000,))).tasks()
    assert task.num_pairs == 2


def test_the_script_of_dsec_gives_medians_and_ranges_of_rounds_that_agree() -> None:
    same = {"pairs": 8, "rejected": 0, "windows": 8, "events_covered": 10**9, "events_drawn": 2 * 10**8}
    same |= {"workers": 2, "fingerprint": "f"}
    rounds = [same | {"seconds": seconds, "worker_peak_bytes": 2**28} for seconds in (4.0, 2.0, 5.0)]
    found = prepare_dsec.summary(("--durations", "1s"), rounds)
    assert found["seconds"] == {"median": 4.0, "range": [2.0, 5.0]}
    assert found["million_events_drawn_per_s_per_core"] == {"median": 25.0, "range": [20.0, 50.0]}
    assert found["windows_per_s_per_core"]["median"] == 1.0
    with pytest.raises(AssertionError):
        prepare_dsec.summary((), [*rounds, rounds[0] | {"fingerprint": "g"}])
    alone = {f"of_four_{name}_alone": {"seconds": {"median": 3.0}} for name in "abcd"}
    shares = prepare_dsec.four_durations({**alone, "four_durations_in_one": {"seconds": {"median": 6.0}}})
    assert shares == {"together_s": 6.0, "one_by_one_s": 12.0, "share": 0.5}


def test_the_script_of_dsec_draws_what_the_loop_draws(tmp_path: Path) -> None:
    from dsec_drives import write_small

    write_small(tmp_path, "drive_00", frames=102)
    found = prepare_dsec.against_the_loop(tmp_path, "drive_00", 1, 2)
    assert len(found["windows"]) == 2
    for ratio in ("ratio_events_side", "ratio_whole_pair", "ratio_five_whole_pairs", "ratio_drawing_alone"):
        assert 0 < found[ratio]["range"][0] <= found[ratio]["median"] <= found[ratio]["range"][1]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_every_result_says_where_it_comes_from(path: Path) -> None:
    origin = json.loads(path.read_text())["provenance"]
    assert {"command", "date", "commit", "cpu", "cores"} <= set(origin)


def test_the_replay_script_finds_the_cost_of_a_pass_at_which_nothing_is_gained() -> None:
    from ray_app.drafters.cost import RowCost
    from ray_app.drafters.replay import RowReplay
    from ray_app.drafters.summary import ReplayedRow

    row = RowReplay(length=6, drafted=(2, 2), accepted=(2, 2), at_once=(), prefix=0, matches=0, seconds=0.0)

    def rows(steps: float) -> list[ReplayedRow]:
        cost = RowCost(plain_ms=160.0, one_shot_ms=160.0, continuous_ms=100.0 + 2 * 10.0 * steps)
        return [ReplayedRow(block, 0, row, (1,) * 6, cost, 10.0, 10.0 * steps, 0.0) for block in range(2)]

    found = replay.verify_sensitivity(rows)
    assert found["1.5"]["continuous_speedup"] == pytest.approx(160 / 130)
    assert found["break_even_steps"] == pytest.approx(3.0)  # 100 + 2 · 30 = 160


@pytest.mark.parametrize("name", ["EventPlaceHybrid", "EventSetHybrid"])
def test_the_replay_scripts_hybrids_see_what_eventgpt_said(name: str) -> None:
    """Two answers that begin alike, each with an EventGPT text of its own."""
    from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt

    one, other = (
        AnsweredPrompt(Prompt("q", (1, 2, 3)), (7, 8, 9)),
        AnsweredPrompt(Prompt("q", (4, 5, 6)), (17, 18, 19)),
    )
    drafter = getattr(replay, name)()
    drafter.fit([one, other] * 20)
    for each in (one, other):
        assert tuple(drafter.draft(each.prompt, (), 3).tokens) == each.answer


def test_the_replay_script_runs_every_drafter_on_made_up_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from made_up_traces import rows, write

    saved: dict[str, dict] = {}
    monkeypatch.setattr(replay, "save", lambda name, result: saved.update({name: result}))
    monkeypatch.setattr(replay, "GAP", 3)
    monkeypatch.setattr(replay, "ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["replay.py", str(write(tmp_path / "a.jsonl", rows(40)))])
    replay.main()
    result = saved["replay"]
    assert set(result["by_gamma"]["8"]) == set(replay.NAMES)
    assert "adapter" not in replay.NAMES
    assert set(result["second_device"]) == {"what", "eventgpt", "prompt_lookup", "retrieval"}
    for name in ("event_place", "event_set"):
        found = result["hybrid_with_event_tokens"][name]["1s"]
        hybrid = result["by_gamma"]["8"]["hybrid"]["1s"]["tokens_per_target_pass"]
        assert found["tokens_per_target_pass"] - found["difference"] == pytest.approx(hybrid)
    share = result["overhead"]["share_of_a_target_step"]["ngram"]
    assert share == pytest.approx(result["overhead"]["us_per_token"]["ngram"] / 14_500)
    json.dumps(result, allow_nan=False)


def test_one_command_runs_every_script_of_the_endpoint_and_names_what_failed() -> None:
    commands: list[str] = []

    def run(command: str) -> int:
        commands.append(command)
        return int("kills" in command)

    assert all_of(list(PARTS), run) == ["chaos kills"]
    assert {command.split()[0] for command in commands} == {"load", "precision", "chaos", "fuzz", "memory"}
    written = (BENCHMARKS / "serve" / "chaos.py").read_text()
    for command in commands:
        assert (BENCHMARKS / "serve" / f"{command.split()[0]}.py").is_file()
        if command.startswith("chaos"):
            assert f'"{command.split()[1]}":' in written


@pytest.mark.parametrize("page", results_tables.PAGES, ids=lambda page: page.stem)
def test_the_numbers_of_a_page_are_those_of_the_results(page: Path) -> None:
    """Written again by `python -m benchmarks.results_tables`."""
    assert results_tables.filled(page.read_text(), page) == page.read_text()


def test_a_result_of_uncommitted_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"provenance": {"commit": "0123456789ab", "uncommitted_changes": True}, "speed": {"s": 2.5}}
    monkeypatch.setattr(results_tables, "read", lambda _: result)
    assert results_tables.facts(("a step", "made_up", "speed/s", "{:.2f} s", "3 s")).rows == [
        ("a step", "2.50 s", "3 s")
    ]
    with pytest.raises(AssertionError, match="made_up is of code that was not committed: measure it again"):
        results_tables.source_line("made_up", results_tables.ROOT / "README.md")
