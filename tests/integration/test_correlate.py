"""Proxy against truth: the maths by hand, and adapters whose worth is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_app import cli
from ray_app.commands.correlate.command import run_correlate
from ray_app.commands.evaluate.command import token_report_link
from ray_app.commands.replay.command import run_replay
from ray_app.config.evaluate import EvaluateConfig
from ray_app.config.speculative import CorrelateConfig, ReplayConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.speculative.correlation import Places, cosines, judge, rank_correlation, spearman
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.hidden_states import AdapterDrafter, HiddenStateDrafter
from ray_app.errors import CheckpointError, ConfigError, InputError
from ray_app.store.atomic import write_file
from ray_app.store.capture_store import SHARDS, TRACES, Shard, as_lines, state_key, write_shard
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec

WIDTH, WORDS = 24, 12


def places(cos: list[float], match: list[int], block: list[int]) -> Places:
    return Places(np.array(cos), np.array(match, bool), np.array(block))


def test_a_hand_worked_case() -> None:
    found = judge(
        places([0.95, 0.85, 0.85, 0.15, 0.05], [1, 1, 0, 1, 0], [0, 0, 1, 1, 1]), 2, np.random.default_rng(0)
    )
    assert found["places"] == 5
    assert found["cos_mean"] == pytest.approx(2.85 / 5)
    assert found["match_rate"] == pytest.approx(3 / 5)
    assert found["cosine_accept_rate"]["0.80"] == pytest.approx(3 / 5)
    assert found["match_rate_above"]["0.80"] == pytest.approx(2 / 3)
    assert found["match_rate_above"]["0.90"] == 1.0
    assert found["match_rate_above"]["0.95"] is None  # strictly above: nothing is
    # pairs of a match and a miss: .95 beats both, .85 ties one and beats one, .15 loses one and beats one
    assert found["auc"] == pytest.approx((2 + 1.5 + 1) / 6)
    errors = [(0.95 - 1) ** 2, (0.85 - 1) ** 2, 0.85**2, (0.15 - 1) ** 2, 0.05**2]
    assert found["brier"] == pytest.approx(sum(errors) / 5)
    assert found["brier_constant"] == pytest.approx(0.6 * 0.4)
    # bins: [0, .1) 0.05 against 0; [.1, .2) 0.15 against 1; [.8, .9) 1.7 against 1; [.9, 1] 0.95 against 1
    assert found["calibration_error"] == pytest.approx((0.05 + 0.85 + 0.7 + 0.05) / 5)
    assert found["reliability"][2] == {
        "from": 0.8,
        "to": 0.9,
        "places": 2,
        "mean_cos": pytest.approx(0.85),
        "match_rate": 0.5,
    }
    assert found["interval95"]["match_rate"] == pytest.approx([1 / 3, 1.0])  # blocks: 2 of 2, and 1 of 3
    json.dumps(found, allow_nan=False)


def test_one_block_has_no_interval_and_sameness_no_auc() -> None:
    found = judge(places([0.5, 0.6], [1, 1], [0, 0]), 1, np.random.default_rng(0))
    assert found["auc"] is None
    assert found["interval95"]["match_rate"] is None
    with pytest.raises(InputError, match="each place needs both"):
        places([], [], [])


def test_a_cosine_that_is_the_chance_is_calibrated_and_another_is_not() -> None:
    rng = np.random.default_rng(0)
    chance = rng.uniform(0, 1, 20_000)
    match, block = rng.uniform(0, 1, 20_000) < chance, np.arange(20_000) % 50
    right = judge(Places(chance, match, block), 50, rng)
    wrong = judge(Places(1.0 - chance, match, block), 50, rng)
    assert right["calibration_error"] < 0.02 < 0.4 < wrong["calibration_error"]
    assert right["auc"] > 0.8
    assert wrong["auc"] == pytest.approx(1 - right["auc"], abs=0.01)
    low, high = right["interval95"]["match_rate_above"]["0.80"]
    assert low < 0.9 < high  # the mean of chances above 0.80
    assert high - low < 0.05


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(0.8660254)  # ranks 0.5 0.5 2
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_ranks_of_adapters_that_cosine_turns_round() -> None:
    """The higher the cosine the fewer matches."""
    adapters = {
        str(n): places([0.72 + 0.05 * n] * 10, [1] * (9 - n) + [0] * (1 + n), list(range(10))) for n in range(4)
    }
    found = rank_correlation(adapters, 10, np.random.default_rng(0))
    assert found["cos_mean"] == pytest.approx(-1.0)
    assert found["cosine_accept_rate_0.80"] == pytest.approx(-0.8944, abs=1e-3)  # 0, 0, 1, 1 against 9, 8, 7, 6
    assert found["interval95"]["cos_mean"][0] <= -0.99
    few = rank_correlation(dict(list(adapters.items())[:2]), 10, np.random.default_rng(0))
    assert few["cos_mean"] is None


def test_a_zero_state_has_cosine_zero() -> None:
    one = np.array([[1.0, 0.0], [0.0, 0.0]], np.float32)
    assert cosines(one, np.array([[1.0, 1.0], [1.0, 0.0]], np.float32)) == pytest.approx([0.5**0.5, 0.0])


def test_state_drafters_take_the_token_of_the_nearest_state() -> None:
    axes = np.eye(3, dtype=np.float32)
    known = AnsweredPrompt(Prompt("q", (7, 7), axes[:2]), (4, 5, 6), axes)
    asked = Prompt("q", (7, 7, 7), 2.0 * axes[[1, 0]] + 0.1, aligned_states=axes[[2, 2, 0]])
    hidden, adapter = HiddenStateDrafter(), AdapterDrafter()
    for drafter in (hidden, adapter):
        drafter.fit([known])
    assert hidden.draft(asked, (), 8).tokens == (5, 4)
    assert adapter.draft(asked, (9,), 8).tokens == (6, 4)
    assert hidden.draft(Prompt("q", (7,)), (), 8).tokens == ()
    with pytest.raises(InputError, match="states of width 2 cannot be compared with those of width 3"):
        hidden.draft(Prompt("q", (7,), np.ones((1, 2), np.float32)), (), 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces whose target states are noisy vectors of their tokens; the drafter sees them turned by a matrix.

    `exact` turns them back, `half` half of the way, `other` somewhere else.
    """
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    words = rng.normal(size=(WORDS, WIDTH))
    turn, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    rows, states = [], {}
    for row in range(60):
        tokens = [*rng.integers(3, WORDS, 9).tolist(), 2]
        target = words[tokens] + 0.1 * rng.normal(size=(10, WIDTH))
        draft = (words[tokens] + 0.6 * rng.normal(size=(10, WIDTH))) @ turn
        rows.append(
            {
                "row": row,
                "sequence": f"drive {row // 6}",
                "question": "q",
                "draft_tokens": tokens,
                "target_tokens": tokens,
                "states": f"{SHARDS}/all.safetensors",
            }
        )
        for side, state in (("draft", draft), ("target", target)):
            states[state_key(row, side)] = torch.from_numpy(state).to(torch.bfloat16)  # type: ignore[arg-type]
    write_shard(folder, "all", Shard(rows, []), states)
    write_file(folder / TRACES, as_lines(rows))
    back = torch.from_numpy(turn).float()  # a linear layer multiplies with the transposed matrix
    save_linear(folder / "exact", back)
    save_linear(folder / "half", (back + torch.eye(WIDTH)) / 2)
    save_linear(folder / "other", -back)
    return folder


def save_linear(folder: Path, weight_DE: torch.Tensor, width: int = WIDTH) -> None:
    adapter = build_adapter(AdapterConfig("linear", width, width), seed=0)
    with torch.no_grad():
        adapter.output.weight.copy_(weight_DE)
        adapter.output.bias.zero_()
    feature = FeatureSpec(dtype="float32", shape=(width,), scale=1.0)
    features = Features(event=feature, target=feature)
    save_checkpoint(folder, adapter, metrics={}, provenance={}, features=features)


@pytest.mark.usefixtures("ray_cluster")
def test_adapters_of_known_worth(world: Path, tmp_path: Path) -> None:
    adapters = tuple(world / name for name in ("other", "half", "exact"))
    result = run_correlate(
        CorrelateConfig(traces=(world / TRACES,), adapter=adapters, out=tmp_path / "out", folds=3, fold_gap=3)
    )
    found = {**result["baselines"], **result["adapters"]}
    assert (result["rows"], result["blocks"]) == (60, 10)
    assert set(result["baselines"]) == {"raw", "mean_target"}
    assert found["exact"]["match_rate"] > 0.95
    assert found["exact"]["match_rate"] > found["half"]["match_rate"] > found["other"]["match_rate"]
    assert found["exact"]["cos_mean"] > 0.8 > 0.7 > found["half"]["cos_mean"] > found["other"]["cos_mean"]
    assert found["exact"]["accepted_in_a_row"] > 8 > found["other"]["accepted_in_a_row"]
    assert found["mean_target"]["match_rate"] < 0.3
    assert result["rank_correlation"]["cos_mean"] == pytest.approx(1.0)
    assert "Cosine acceptance is not token acceptance" in result["verdict"][0]
    page = (tmp_path / "out" / "correlation.html").read_text()
    assert "<svg" in page
    assert "exact" in page
    assert "http" not in page
    assert (
        json.loads((tmp_path / "out" / "correlation.json").read_text())["adapters"].keys()
        == result["adapters"].keys()
    )


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("form", [["--json"], []])
def test_lines_that_were_set_aside_are_printed(
    form: list[str], world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, out = world / "cut.jsonl", tmp_path / "out"
    path.write_text((world / TRACES).read_text() + '{"row": 60, "<questi')
    assert cli.run(["correlate", str(path), "--out", str(out), *form]) == 0
    printed = capfd.readouterr()
    assert f"rejected: {path}, line 61: cut short, or not JSON" in printed.err
    result = json.loads((out / "correlation.json").read_text())
    [rejected] = result["rejected"]
    assert (rejected["file"], rejected["line"]) == (str(path), 61)
    assert rejected["reason"].startswith("cut short, or not JSON (Unterminated string")
    assert f"rejected: {path}, line 61: cut short, or not JSON" in (out / "correlation.html").read_text()
    assert form != ["--json"] or json.loads(printed.out)["rejected"] == result["rejected"]


@pytest.mark.usefixtures("ray_cluster")
def test_a_place_is_looked_up_in_other_sequences_alone(world: Path, tmp_path: Path) -> None:
    """All rows are of one drive but the last: it alone lends tokens to the others."""
    lines = [json.loads(line) for line in (world / TRACES).read_text().splitlines()]
    for line in lines:
        line["sequence"] = "last" if line is lines[-1] else "others"
    path = world / "named.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run_correlate(CorrelateConfig(traces=(path,), adapter=(world / "exact",), out=tmp_path / "out"))
    lent = [token in lines[-1]["target_tokens"] for line in lines for token in line["target_tokens"]]
    assert result["folds"] == 2
    assert np.mean(lent) - 0.1 < result["adapters"]["exact"]["match_rate"] < np.mean(lent) + 0.02 < 0.9


@pytest.mark.usefixtures("ray_cluster")
def test_replay_drafts_from_states(world: Path) -> None:
    cfg = ReplayConfig(
        traces=(world / TRACES,), drafter=("hidden_state", "adapter"), num_speculative_tokens=4, folds=3, fold_gap=3
    )
    with pytest.raises(ConfigError, match="'adapter' needs --adapter CKPT"):
        run_replay(cfg)
    result = run_replay(cfg.model_copy(update={"adapter": world / "exact"}))
    rates = {name: found["match_rate"] for name, found in result["results"].items()}
    assert rates["adapter"] > 0.95
    assert rates["hidden_state"] > 0.7 > rates["positional"]


@pytest.mark.usefixtures("ray_cluster")
def test_states_that_cannot_be_used(world: Path, tmp_path: Path, shared_data: Path) -> None:
    plain = shared_data / "tokens" / "dsec_test_5s.jsonl"
    with pytest.raises(InputError, match="drafter 'hidden_state' needs both models' states, and 193 of 193 rows"):
        run_replay(ReplayConfig(traces=(plain,), drafter=("hidden_state",)))
    with pytest.raises(InputError, match="correlate needs both models' states"):
        run_correlate(CorrelateConfig(traces=(plain,), out=tmp_path / "out"))
    save_linear(tmp_path / "wide", torch.eye(WIDTH + 1), WIDTH + 1)
    with pytest.raises(CheckpointError, match="width 25 to width 25"):
        run_correlate(
            CorrelateConfig(
                traces=(world / TRACES,), adapter=(tmp_path / "wide",), out=tmp_path / "out", folds=3, fold_gap=3
            )
        )
    lines = (world / TRACES).read_text().replace("shards/all", "../shards/all")
    (tmp_path / "away.jsonl").write_text(lines)
    with pytest.raises(InputError, match="does not name a states file"):
        run_correlate(CorrelateConfig(traces=(tmp_path / "away.jsonl",), out=tmp_path / "out", folds=3, fold_gap=3))


def test_the_alignment_report_links_to_the_page(tmp_path: Path) -> None:
    page = tmp_path / "report of today" / "correlation.html"
    cfg = EvaluateConfig(store=tmp_path, checkpoint="c", out=tmp_path / "reports" / "a", token_report=page)
    with pytest.raises(InputError, match="is not a file"):
        token_report_link(cfg)
    page.parent.mkdir()
    page.touch()
    assert token_report_link(cfg) == "../../report%20of%20today/correlation.html"
    assert token_report_link(cfg.model_copy(update={"token_report": None})) is None
