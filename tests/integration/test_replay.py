"""`replay`: the numbers by hand, what the baselines show, and what is said where a drafter is not worth it."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_up_traces import LENGTH, TIMING, rows, write
from pages import assert_has_words, assert_light_and_dark, assert_self_contained
from rich.console import Console

from ray_app import cli
from ray_app.commands.replay.command import render_replay, run_replay
from ray_app.config.speculative import ReplayConfig
from ray_app.drafters.cost import RowCost, StepTimes, row_cost
from ray_app.drafters.replay import RowReplay
from ray_app.drafters.summary import METRICS, ReplayedRow, details, match_rate_by_shift, rate_of_group, summarise
from ray_app.errors import ConfigError, InputError

TIMES = StepTimes(
    target_prefill_ms=300.0, target_step_ms=15.0, verify_ms=20.0, empty_ms=15.0, event_start_ms=0.0, event_step_ms=0.0
)
ROW = RowReplay(
    length=10, drafted=(4, 4, 4), accepted=(4, 2, 1), at_once=(1, 2, 3, 4, 9), prefix=4, matches=4, seconds=0.003
)
"""Passes give 5, 3 and 2 tokens."""


def shown(result: object) -> str:
    console = Console(record=True, width=200)
    render_replay(result, console)  # type: ignore[arg-type]
    return console.export_text()


def test_the_cost_of_a_row_by_hand() -> None:
    cost = row_cost(ROW, TIMES, gamma=4, num_event_tokens=0, device="same")
    assert cost.plain_ms == 300 + 10 * 15
    assert cost.one_shot_ms == pytest.approx(300 + 1 + 20 + 5 * 15)  # 4 accepted, 1 of the target, 5 plain steps
    assert cost.continuous_ms == pytest.approx(300 + 3 + 3 * 20)


def test_eventgpt_costs_its_time_unless_a_second_device_hides_it() -> None:
    times = StepTimes(300.0, 15.0, 20.0, 15.0, event_start_ms=100.0, event_step_ms=10.0)
    same = row_cost(ROW, times, gamma=4, num_event_tokens=30, device="same")
    second = row_cost(ROW, times, gamma=4, num_event_tokens=30, device="separate")
    assert same.one_shot_ms - second.one_shot_ms == pytest.approx(140)  # four tokens of it, within the prefill
    assert second.continuous_ms == pytest.approx(400 + 3 + 60)  # all thirty, 100 ms longer than the prefill
    assert same.continuous_ms == pytest.approx(300 + 400 + 3 + 60)


def test_the_summary_by_hand() -> None:
    other = RowReplay(length=2, drafted=(4, 0), accepted=(0, 0), at_once=(7, 7), prefix=0, matches=1, seconds=0.0)
    cost = RowCost(plain_ms=100.0, one_shot_ms=50.0, continuous_ms=40.0)
    slow = RowCost(plain_ms=100.0, one_shot_ms=150.0, continuous_ms=110.0)
    both = [
        ReplayedRow(0, 0, ROW, tuple(range(10)), cost, 15.0, 15.0, 0.0),
        ReplayedRow(1, 0, other, (7, 8), slow, 15.0, 21.0, 0.0),
    ]
    found = summarise(both, 4, np.random.default_rng(0))
    assert found["tokens_per_target_pass"] == pytest.approx((10 / 3 + 2 / 2) / 2)
    assert found["mean_acceptance_length"] == pytest.approx(1 + 7 / 5)
    assert found["draft_acceptance_rate"] == pytest.approx(7 / 16)
    assert found["match_rate"] == pytest.approx(5 / 12)
    assert (found["accepted_prefix_mean"], found["accepted_prefix_median"]) == (2.0, 2.0)
    assert found["one_shot_speedup"] == pytest.approx(1.0)  # ratio of sums, not the mean of 2 and 2/3
    alpha, c = 7 / 10, 3 / 16 / 15
    assert found["expected_speedup"] == pytest.approx(sum(alpha**k for k in range(5)) / (4 * c + 1))
    assert set(found["interval95"]) == set(METRICS)
    assert found["interval95"]["match_rate"] == pytest.approx([0.4, 0.5])
    more = details(both, 4, np.random.default_rng(0))
    assert more["num_accepted_tokens_per_pos"] == [3, 2, 1, 1]
    assert more["passes_by_accepted"] == [2, 1, 1, 0, 1]
    assert more["rows_by_prefix"] == [1, 0, 0, 0, 1]
    assert more["one_shot_slower_share"] == 0.5
    assert more["continuous_slower_share"] == 0.5
    assert more["continuous_speedup"] == pytest.approx(200 / 150)
    assert more["alpha"] == pytest.approx(alpha)
    assert (more["num_speculative_tokens"], more["cost_coefficient"]) == (4, pytest.approx(c))
    # what draws of the two blocks may give: either alone, or both
    assert more["interval95"]["continuous_speedup"] == pytest.approx([100 / 110, 100 / 40])
    assert more["interval95"]["alpha"] == pytest.approx([0.0, 7 / 9])
    assert more["interval95"]["one_shot_slower_share"] == [0.0, 1.0]
    assert more["interval95"]["acceptance_by_place"] == [[0.0, found / 3] for found in (3, 2, 1, 1)]
    group = rate_of_group(both, np.random.default_rng(0))
    assert group["tokens_per_target_pass"] == found["tokens_per_target_pass"]
    assert group["interval95"] == pytest.approx([1.0, 10 / 3])


def test_break_even_goes_by_the_measured_cost_of_a_pass() -> None:
    """One drafted token: a pass gives 1 + α tokens, so it pays from α = verify / step + c − 1 on."""
    row = RowReplay(length=4, drafted=(1,) * 4, accepted=(0,) * 4, at_once=(), prefix=0, matches=0, seconds=0.012)
    cost = RowCost(plain_ms=60.0, one_shot_ms=60.0, continuous_ms=60.0)

    def least(verify_ms: float) -> float | None:
        rows = [ReplayedRow(0, 0, row, (1, 2, 3, 4), cost, 15.0, verify_ms, 0.0)]
        return details(rows, 1, np.random.default_rng(0))["break_even_alpha"]  # type: ignore[no-any-return]

    c = 12 / 4 / 15
    assert least(15.0) == pytest.approx(c)
    assert least(21.0) == pytest.approx(0.4 + c)
    assert least(30.0) is None


def test_without_measured_times_there_are_no_speedups() -> None:
    found = summarise([ReplayedRow(0, 0, ROW, tuple(range(10)), None, 0.0, 0.0, 0.0)], 4, np.random.default_rng(0))
    assert found["one_shot_speedup"] is found["expected_speedup"] is None
    assert found["interval95"]["match_rate"] is None  # one block
    more = details([ReplayedRow(0, 0, ROW, tuple(range(10)), None, 0.0, 0.0, 0.0)], 4, np.random.default_rng(0))
    for name in ("continuous_speedup", "continuous_slower_share", "cost_coefficient", "break_even_alpha"):
        assert more[name] is None
    json.dumps([found, more], allow_nan=False)


def test_a_shift_is_seen() -> None:
    text = list(range(20))
    rates = match_rate_by_shift([(text[:-1], text[1:])], (-1, 0, 1))
    assert (rates[0], rates[1]) == (0.0, 0.0)
    assert rates[-1] > 0.9


@pytest.mark.usefixtures("ray_cluster")
def test_replay_gives_the_keys_of_its_promise_and_finds_the_drive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(80))
    result = run_replay(
        ReplayConfig(traces=(path,), drafter=("none", "eventgpt", "hybrid"), num_speculative_tokens=4, fold_gap=5)
    )
    assert set(result) == {"results", "folds", "fold_gap", "num_speculative_tokens", "rows"}
    assert (result["folds"], result["fold_gap"], result["num_speculative_tokens"], result["rows"]) == (5, 5, 4, 80)
    names = {"none", "constant", "eventgpt", "positional", "previous_window", "hybrid"}
    assert set(result["results"]) == names
    for numbers in result["results"].values():
        assert set(numbers) == {*METRICS, "interval95"}
    rates = {name: numbers["tokens_per_target_pass"] for name, numbers in result["results"].items()}
    assert rates["none"] == 1.0
    assert rates["eventgpt"] < 1.1
    assert rates["previous_window"] > 3.5
    assert (
        result["results"]["eventgpt"]["one_shot_speedup"]
        < 1.0
        < result["results"]["previous_window"]["one_shot_speedup"]
    )
    text = shown(result)
    assert text.startswith("NOT better than positional and previous_window, which cost nothing: none, eventgpt")
    assert "verify(4) was not measured" in text
    assert "no shift is needed" in text
    low, high = result.report.details["previous_window"]["interval95"]["continuous_speedup"]
    assert f"× [{low:.2f}, {high:.2f}]" in text
    assert "without prefill and with a pass as long as a step" in text
    json.dumps(result, allow_nan=False)


def test_shuffled_drafts_are_exchanged_within_a_fold_alone() -> None:
    """Six rows of one token each that were drafted rightly, in one fold and in six."""
    replays = [RowReplay(1, (1,), (1,), at_once=(n,), prefix=1, matches=1, seconds=0.0) for n in range(6)]
    for one_fold in (True, False):
        rows = [ReplayedRow(0, 0 if one_fold else n, replays[n], (n,), None, 0.0, 0.0, 0.0) for n in range(6)]
        found = details(rows, 1, np.random.default_rng(0))["shuffled_match_rate"]
        assert found < 0.6 if one_fold else found == 1.0


@pytest.mark.usefixtures("ray_cluster")
def test_input_that_looks_shifted_or_is_set_aside_is_printed(tmp_path: Path) -> None:
    made = rows(60, timed=False)
    for row in made:
        row["draft_tokens"] = [1, *row["target_tokens"]]
    path = write(tmp_path / "a.jsonl", made)
    path.write_text(path.read_text() + '{"row": 60, "questi')
    result = run_replay(ReplayConfig(traces=(path,), drafter=("none",), fold_gap=5))
    text = shown(result)
    assert "SHIFT: EventGPT's tokens match best when moved by -1" in text
    assert "BOS: only the drafts begin with the start token 1" in text
    assert "give --timing FILE" in text


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("form", [["--json"], []])
def test_lines_that_were_set_aside_are_printed_on_standard_error(
    form: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.jsonl", rows(60))
    path.write_text(path.read_text() + '{"row": 60, "questi')
    assert cli.run(["replay", str(path), "--drafter", "none", "--fold-gap", "5", *form]) == 0
    assert f"rejected: {path}, line 61: cut short, or not JSON" in capfd.readouterr().err


@pytest.mark.usefixtures("ray_cluster")
def test_where_sequences_are_named_each_is_replayed_whole_by_who_never_saw_it(tmp_path: Path) -> None:
    """Two drives in turn, each of one answer of its own: the other drive teaches nothing of it."""
    made = rows(40)
    for n, row in enumerate(made):
        row["sequence"] = "ab"[n % 2]
        row["target_tokens"] = [*range(10 + 30 * (n % 2), 29 + 30 * (n % 2)), 2]
    cfg = ReplayConfig(
        traces=(write(tmp_path / "a.jsonl", made),), drafter=("ngram",), num_speculative_tokens=4, fold_gap=5
    )
    result = run_replay(cfg)
    assert result["folds"] == 2
    assert result["results"]["ngram"]["match_rate"] == pytest.approx(1 / 20)  # the end token
    assert result["results"]["previous_window"]["match_rate"] == pytest.approx(
        19 / 20
    )  # the first row of each has none
    assert result["results"]["ngram"]["interval95"]["match_rate"] == pytest.approx([1 / 20, 1 / 20])
    assert "2 folds (whole sequences)" in shown(result)
    for row in made:
        del row["sequence"]
    result = run_replay(cfg.model_copy(update={"traces": (write(tmp_path / "b.jsonl", made),), "fold_gap": 1}))
    assert result["folds"] == 5
    assert result["results"]["ngram"]["match_rate"] > 0.4  # half of the rows at least are known from elsewhere
    assert result["results"]["previous_window"]["match_rate"] < 0.1  # it is the other drive's
    assert "5 folds (contiguous, with a gap)" in shown(result)


@pytest.mark.usefixtures("ray_cluster")
def test_times_of_ones_own_replace_the_traces(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(60))
    timing = tmp_path / "timing.json"
    timing.write_text(json.dumps({**TIMING, "target_prefill": 1.0, "verify": {"4": 29.0}}))
    slow = run_replay(
        ReplayConfig(traces=(path,), drafter=("none",), num_speculative_tokens=4, fold_gap=5, timing=timing)
    )
    own = run_replay(ReplayConfig(traces=(path,), drafter=("none",), num_speculative_tokens=4, fold_gap=5))
    speed = [found.report.details["previous_window"]["continuous_speedup"] for found in (slow, own)]
    per_pass = own["results"]["previous_window"]["mean_acceptance_length"]
    assert speed[0] == pytest.approx(
        per_pass / 2, rel=0.2
    )  # passes cost two steps, and there is no prefill to speak of
    assert LENGTH * 14.5 < 320 + 100  # with the recorded prefill there is less to gain
    assert speed[1] < per_pass / 1.5


@pytest.mark.usefixtures("ray_cluster")
def test_what_the_user_can_fix(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(60))
    with pytest.raises(ConfigError, match="no drafter 'psychic'; there are: none"):
        run_replay(ReplayConfig(traces=(path,), drafter=("psychic",)))
    with pytest.raises(ConfigError, match="smaller gap"):
        run_replay(ReplayConfig(traces=(path,), fold_gap=30))
    with pytest.raises(InputError, match="cannot be read"):
        run_replay(ReplayConfig(traces=(tmp_path / "none.jsonl",)))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("timed", [True, False])
def test_the_page_holds_the_flag_the_numbers_and_every_plot(timed: bool, tmp_path: Path) -> None:
    made = rows(60, timed=timed)
    made[3]["question"] = "what <b>moves</b>?"
    path, page_path = write(tmp_path / "a.jsonl", made), tmp_path / "pages" / "replay.html"
    result = run_replay(ReplayConfig(traces=(path,), drafter=("eventgpt", "ngram"), fold_gap=5, html=page_path))
    page = page_path.read_text()
    for check in (assert_self_contained, assert_has_words, assert_light_and_dark):
        check(page)
    assert '<h1 class="loses">NOT better than positional and previous_window, which cost nothing: eventgpt' in page
    for numbers in result["results"].values():
        assert f">{numbers['tokens_per_target_pass']:.2f} [" in page
    speedups = [more["interval95"]["continuous_speedup"] for more in result.report.details.values()]
    assert all((interval is not None) == timed for interval in speedups)
    assert not timed or all(f"× [{low:.2f}, {high:.2f}]<" in page for low, high in speedups)
    assert page.count("<svg") == 2 * (5 if timed else 4)  # wide and narrow
    assert ("<h2>Speed-up</h2>" in page) == timed
    assert "<b>moves</b>" not in page
    assert str(page_path) in shown(result)
    with pytest.raises(ConfigError, match=r"end its name in \.html"):
        run_replay(ReplayConfig(traces=(path,), html=tmp_path / "a.png"))


@pytest.mark.usefixtures("ray_cluster")
def test_json_is_one_object(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.jsonl", rows(60))
    assert (
        cli.run(
            ["replay", str(path), "--drafter", "ngram", "--num-speculative-tokens", "2", "--fold-gap", "5", "--json"]
        )
        == 0
    )
    assert set(json.loads(capfd.readouterr().out)["results"]) == {
        "ngram",
        "constant",
        "positional",
        "previous_window",
    }


@pytest.mark.usefixtures("ray_cluster")
def test_the_real_traces_give_the_known_figures(shared_data: Path) -> None:
    path = shared_data / "tokens" / "dsec_test_5s.jsonl"
    result = run_replay(ReplayConfig(traces=(path,), drafter=("eventgpt", "ngram")))["results"]
    assert result["eventgpt"]["match_rate"] < 0.03
    assert 0.2 < result["positional"]["match_rate"] < 0.35
    assert 0.33 < result["previous_window"]["match_rate"] < 0.5
    assert result["eventgpt"]["one_shot_speedup"] < 1.0
    assert result["ngram"]["tokens_per_target_pass"] > 2.5


@pytest.mark.usefixtures("ray_cluster")
def test_hybrid_is_ahead_on_real_traces(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "tokens" / "dsec_test_5s.jsonl").read_text().splitlines(keepends=True)
    path = tmp_path / "short.jsonl"
    path.write_text("".join(lines[:60]))
    result = run_replay(ReplayConfig(traces=(path,), drafter=("ngram", "hybrid"), folds=2, fold_gap=10))
    rates = {name: found["tokens_per_target_pass"] for name, found in result["results"].items()}
    assert rates["hybrid"] > 1.2 * max(rates["ngram"], rates["previous_window"])
    assert "hybrid" not in result.report.behind
