"""A sweep of drafters to its end, and its winner in a registry: real Ray Tune and MLflow, tiny models."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console
from small_drafting import draft_sweep_file, write_work
from sweeps import sweep_config

from ray_app.commands.demo.draft_training import TEST
from ray_app.commands.promote.command import render_promote, run_promote
from ray_app.commands.tune.command import render_tune, run_tune
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.config.evaluate import PromoteConfig
from ray_app.config.tune import TOKENS
from ray_app.errors import ConfigError
from ray_app.runs.event_log import entries
from ray_app.store.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_work(tmp_path_factory.mktemp("drafting"))


@pytest.fixture(scope="module")
def swept(root: Path) -> dict[str, Any]:
    grid = {"space": {"rank": [2, 3]}, "search_alg": "grid", "num_final_seeds": 1, "max_concurrent_trials": 1}
    path = draft_sweep_file(root, root, **grid, base_num_epochs=2, base_kl_weight=1.0, base_learning_rate=0.03)
    return run_tune(sweep_config(path, tracking_uri=f"sqlite:///{root / 'mlflow.db'}"))


def printed(render: Any, result: dict[str, Any]) -> str:
    out = io.StringIO()
    render(result, Console(width=200, file=out))
    return out.getvalue()


def test_trials_are_compared_by_tokens_and_the_winner_is_tested_on_other_drives(swept: dict[str, Any]) -> None:
    assert json.loads(json.dumps(swept, allow_nan=False)) == swept
    best, folder = swept["best"], SweepDir(Path(swept["sweep"]))
    assert [trial["config"] for trial in swept["trials"]] == [{"rank": 2}, {"rank": 3}]
    assert best["objective"] == max(trial["objective"] for trial in swept["trials"])
    assert load_checkpoint(Path(best["checkpoint"])).metrics["val"][TOKENS] == best["objective"]
    (seed,) = swept["final"]["seeds"]
    low, high = seed["interval95"][TOKENS]
    assert 1.0 <= low <= seed[TOKENS] <= high <= 9.0
    assert set(seed["baselines"]) == {"no_drafter", "mean_tokens", "other_events"}
    assert seed["pairs"] == 6
    page, text = (folder.path / "sweep.html").read_text(), printed(render_tune, swept)
    for shown in (page, text):
        assert f"{seed[TOKENS]:.2f} ± 0.00 tokens per target pass over 1 seeds" in shown
        assert "accepted at 0.80" not in shown
    assert f"{best['objective']:.3f} tokens per target pass on the validation part" in text


def test_mlflow_has_tokens_and_cosine_of_every_epoch(swept: dict[str, Any], root: Path) -> None:
    client, folder = MlflowClient(f"sqlite:///{root / 'mlflow.db'}"), SweepDir(Path(swept["sweep"]))
    runs = client.search_runs([client.get_experiment_by_name("alignment").experiment_id])
    by_key = {run.data.tags["run_key"]: run for run in runs}
    for trial in swept["trials"]:
        path = folder.run(trial["id"]).path
        epochs = [line["val"] for line in entries(path) if line["kind"] == "epoch"]
        run_id = by_key[json.loads((path / "run.json").read_text())["key"]].info.run_id
        for name, values in (
            (TOKENS, [val[TOKENS] for val in epochs]),
            ("cos_sim_mean", [val["cos_sim_mean"] for val in epochs]),
            ("cosine_accept_rate_0.80", [val["cosine_accept_rate"]["0.80"] for val in epochs]),
        ):
            assert [point.value for point in client.get_metric_history(run_id, f"epoch/val/{name}")] == values
        assert len(epochs) == trial["epochs"] > 0
    (parent,) = [run for run in runs if run.info.run_name == "sweep"]
    points = client.get_metric_history(parent.info.run_id, f"trial/{TOKENS}")
    assert [point.value for point in points] == [trial["objective"] for trial in swept["trials"]]
    final = json.loads((Path(swept["final"]["run"]) / "run.json").read_text())["key"]
    assert by_key[final].data.metrics[f"test/{TOKENS}"] == swept["final"]["seeds"][0][TOKENS]


def test_a_winner_is_champion_of_a_name_of_its_own_and_is_compared_by_tokens(
    swept: dict[str, Any], root: Path
) -> None:
    uri = f"sqlite:///{root / 'mlflow.db'}"

    def promote(run: str, **more: Any) -> dict[str, Any]:
        result = run_promote(PromoteConfig(run=run, store=str(root / TEST), tracking_uri=uri, **more))
        json.dumps(result, allow_nan=False)
        return result

    assert f"--store {root / TEST}" in swept["final"]["promote"]
    first = promote(swept["final"]["run"])
    seed = swept["final"]["seeds"][0]
    assert (first["model"], first["verdict_code"], first["promoted"]) == ("event-tokens", "first", True)
    assert first["metrics"][TOKENS] == seed[TOKENS]
    assert first["metrics"]["interval95"] == seed["interval95"]
    trial = str(SweepDir(Path(swept["sweep"])).run(swept["trials"][0]["id"]).path)
    second = promote(trial)
    assert second["champion_before_metrics"][TOKENS] == first["metrics"][TOKENS]
    assert second["verdict_code"] in ("promoted", "no_gain")
    assert f"against the champion's {first['metrics'][TOKENS]:.3f}" in second["reason"]
    assert "baseline: mean_tokens" in printed(render_promote, second)
    listed = run_promote(PromoteConfig(list=True, tracking_uri=uri, model_name="event-tokens"))
    assert [row[TOKENS] for row in listed["versions"]] == [each["metrics"][TOKENS] for each in (first, second)]
    assert "tokens per target pass" in printed(render_promote, listed)
    client = MlflowClient(uri)
    assert [model.name for model in client.search_registered_models()] == ["event-tokens"]
    client.create_registered_model("served")
    client.create_model_version("served", f"runs:/{first['mlflow_run_id']}/model", first["mlflow_run_id"])
    with pytest.raises(ConfigError, match="versions of 'served' are no event_tokens"):
        promote(trial, model_name="served")
    with pytest.raises(ConfigError, match="was trained on"):
        run_promote(PromoteConfig(run=trial, tracking_uri=uri, test_share=0.9))
