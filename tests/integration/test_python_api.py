"""Own arrays to an evaluated adapter from Python, as the README shows it, and the same model in MLflow."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import local_server
from mlflow import MlflowClient, pyfunc

import ray_app
from ray_app.client import AlignmentClient
from ray_app.commands.evaluate.benchmark import run_benchmark
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.promote.command import run_promote
from ray_app.config.evaluate import BenchmarkConfig, EvaluateConfig, PromoteConfig
from ray_app.errors import RegistryError

pytestmark = pytest.mark.usefixtures("ray_cluster")
README = Path(__file__).resolve().parents[2] / "README.md"
CHAMPION = "models:/alignment-adapter@champion"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the README's first Python block leaves, run in a folder with three arrays."""
    folder = tmp_path_factory.mktemp("mine")
    rng = np.random.default_rng(0)
    causes = rng.normal(size=(240, 6))
    event, target = (np.tanh(causes @ rng.normal(size=(6, width))) for width in (24, 40))
    np.save(folder / "event.npy", event.astype(np.float32))
    np.save(folder / "target.npy", (target + 0.3).astype(np.float32))
    np.save(folder / "drives.npy", np.array([f"drive {n // 12}" for n in range(240)]))
    block = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= 8, "own arrays to an evaluated adapter"
    names: dict[str, Any] = {"folder": folder, "uri": f"sqlite:///{folder}/mlflow.db"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(block, names)  # the README's own code
    return names


def test_the_block_of_the_readme_ends_with_an_adapter_that_beats_the_baselines(mine: dict[str, Any]) -> None:
    model = mine["model"]
    assert model.checkpoint.config.strategy == "lowrank"
    assert mine["aligned"].shape == (240, 40)
    result = model.evaluate(mine["store"].part("test"))
    assert set(result["baselines"]) == {"mean_target", "shuffled", "previous_window"}
    assert result["lift"] > 0.2
    assert result["try_next"] is None


@pytest.fixture(scope="module")
def promoted(mine: dict[str, Any]) -> dict[str, Any]:
    return run_promote(PromoteConfig(run=str(mine["folder"] / "runs" / "mine"), tracking_uri=mine["uri"]))


def test_mlflow_opens_the_champion_and_answers_as_align_does(
    mine: dict[str, Any], promoted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert promoted["promoted"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine["uri"])
    rows = mine["event"][:7]
    model = pyfunc.load_model(CHAMPION)
    np.testing.assert_allclose(model.predict(rows), mine["aligned"][:7], atol=1e-5)
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 24)
    assert model.input_example.shape == (1, 24)
    client = MlflowClient(mine["uri"])
    files = [item.path for item in client.list_artifacts(promoted["mlflow_run_id"], "model")]
    assert not [name for name in files if name.endswith((".pkl", ".pickle"))]
    np.testing.assert_allclose(ray_app.load(CHAMPION, tracking_uri=mine["uri"]).align(rows), model.predict(rows))
    with pytest.raises(RegistryError, match="missing"):
        ray_app.load("models:/alignment-adapter@missing", tracking_uri=mine["uri"])


def test_what_mlflow_opens_answers_as_the_endpoint_does(
    mine: dict[str, Any], promoted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert promoted["promoted"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine["uri"])
    rows = mine["event"].astype(np.float32)
    with (
        local_server(CHAMPION, tracking_uri=mine["uri"]) as server,
        AlignmentClient(f"http://127.0.0.1:{server.port}") as client,
    ):
        answered = np.concatenate([client.align(some).aligned_BD for some in np.array_split(rows, 30)])
    np.testing.assert_allclose(pyfunc.load_model(CHAMPION).predict(rows), answered, rtol=0, atol=1e-4)


def test_a_run_shows_its_data_and_what_evaluate_found(mine: dict[str, Any], promoted: dict[str, Any]) -> None:
    flags = {"store": str(mine["folder"] / "stores" / "mine"), "tracking_uri": mine["uri"]}
    run_dir = str(mine["folder"] / "runs" / "mine")
    result = run_evaluate(EvaluateConfig(checkpoint=run_dir, out=mine["folder"] / "report", **flags))
    client = MlflowClient(mine["uri"])
    assert result["mlflow_run_id"] == promoted["mlflow_run_id"]
    run = client.get_run(result["mlflow_run_id"])
    (data,) = run.inputs.dataset_inputs
    assert json.loads(data.dataset.profile)["fingerprint"] == result["fingerprint"]
    assert data.dataset.digest == result["fingerprint"][:36]
    assert run.data.metrics["test/lift"] == result["lift"]
    assert run.data.metrics["test/retrieval/R_at_1"] == result["retrieval"]["R@1"]
    assert run.data.metrics["test/cosine_accept_rate_0.80"] == result["cosine_accept_rate"]["0.80"]
    assert (run.data.tags["strategy"], run.data.tags["features"]) == ("lowrank", "vectors")
    assert "evaluation/report.html" in [item.path for item in client.list_artifacts(run.info.run_id, "evaluation")]
    found = client.search_runs([run.info.experiment_id], "metrics.`test/lift` > 0 and tags.strategy = 'lowrank'")
    assert [other.info.run_id for other in found] == [run.info.run_id]


def test_a_registered_model_knows_what_it_was_trained_on(mine: dict[str, Any], promoted: dict[str, Any]) -> None:
    assert promoted["promoted"]
    flags = {"store": str(mine["folder"] / "stores" / "mine"), "tracking_uri": mine["uri"], "checkpoint": CHAMPION}
    evaluated = run_evaluate(EvaluateConfig(out=mine["folder"] / "named", **flags))
    assert evaluated["split"]["test_pairs_trained_on"] == 0
    other = run_evaluate(EvaluateConfig(out=mine["folder"] / "leaking", split="window", **flags))
    assert other["split"]["test_pairs_trained_on"] > 0
    everything = run_benchmark(BenchmarkConfig(out=mine["folder"] / "all", **flags))
    assert everything["split"]["test_pairs_trained_on"] == 0
    document = json.loads((mine["folder"] / "all" / "benchmark_adapter_full_S1.json").read_text())
    assert document["before_adapter"] is None
    assert document["sample_results"][0]["cos_sim_before"] is None
