"""On a GPU: the same commands give the CPU's numbers. Skipped, with the reason, where there is none."""

import json
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from endpoints import INFER, RayServer, binary_request
from small_adapters import small_adapter, small_pairs
from small_runs import make_run

from ray_app.commands.evaluate.benchmark import run_benchmark
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.evaluate.compare import compare_checkpoints
from ray_app.commands.train.command import run_train
from ray_app.commands.tune.command import run_tune
from ray_app.config.evaluate import BenchmarkConfig, CompareConfig, EvaluateConfig
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TuneConfig
from ray_app.core.adapters.registry import STRATEGIES
from ray_app.core.adapters.seeded_noise import BatchNoise
from ray_app.core.losses import AlignmentObjective, LossWeights
from ray_app.core.optimizer_step import make_optimizer, training_step
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import ResourceError
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore
from serve.model.loaded_model import load_served
from serve.model.model_source import model_source

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
    pytest.mark.usefixtures("ray_cluster"),
]
WEIGHTS = LossWeights(mse=1.0, cosine=0.5, contrastive=0.1, accept=0.1, centred=0.1)
TRAINED = [name for name, adapter in STRATEGIES.items() if adapter.REQUIRES != "pairs"]


# --- the core ---


def stepped(strategy: str, device: str, precision: Any = "fp32") -> tuple[list[float], torch.Tensor]:
    """Losses of three steps, and all weights after them in one vector."""
    event, target = (side.to(device) for side in small_pairs())
    if strategy.startswith("token_"):
        objective = AlignmentObjective(small_adapter(strategy), replace(WEIGHTS, centred=0.0))
    else:
        objective = AlignmentObjective(small_adapter(strategy), WEIGHTS, mean_target_D=target.mean(0))
    optimizer = make_optimizer(objective.to(device).train(), 1e-3, 0.01)
    losses = [
        training_step(
            objective,
            optimizer,
            event,
            target,
            BatchNoise(0, step, 0, len(event), len(event)),
            global_pairs=len(event),
            precision=precision,
        ).loss_sum
        for step in range(3)
    ]
    return losses, torch.cat([parameter.detach().cpu().flatten() for parameter in objective.parameters()])


@pytest.mark.parametrize("strategy", TRAINED)
def test_every_strategy_takes_the_steps_that_it_takes_on_the_cpu(strategy: str) -> None:
    (there, weights), (here, expected) = stepped(strategy, "cuda"), stepped(strategy, "cpu")
    assert there == pytest.approx(here, rel=1e-4)
    torch.testing.assert_close(weights, expected, atol=5e-4, rtol=1e-3)  # Adam's first steps go by the sign


@pytest.mark.parametrize("strategy", TRAINED)
def test_in_bf16_it_loses_digits_and_nothing_else(strategy: str) -> None:
    (rough, _), (exact, _) = stepped(strategy, "cuda", "bf16"), stepped(strategy, "cuda")
    assert rough == pytest.approx(exact, rel=0.05)


def test_held_pairs_lie_where_they_are_used() -> None:
    here = PairTensors(np.array([3, 5, 9]), *(torch.randint(0, 256, (3, 7), dtype=torch.uint8) for _ in range(2)))
    there = here.on(torch.device("cuda"))
    for mine, expected in zip(there.take(np.array([9, 3])), here.take(np.array([9, 3])), strict=True):
        assert mine.is_cuda
        assert torch.equal(mine.cpu(), expected)


# --- commands ---


def config(store: Path, out: Path, **settings: Any) -> TrainConfig:
    small: dict[str, Any] = {
        **{"strategy": "lightweight", "num_epochs": 3, "hidden_dim": 16},
        **{"batch_size": 8, "rank": 6, "patch": 4},
    }
    uri = f"sqlite:///{out.parent / 'mlflow.db'}"
    return TrainConfig(store=store, out=out, tracking_uri=uri, **(small | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"strategy": "lightweight", "use_gpu": True},
        {"strategy": "conv", "use_gpu": True, "flip": 0.5},
        {"strategy": "lowrank", "use_gpu": True},
        {"strategy": "bottleneck", "use_gpu": True, "init": "pca", "precision": "bf16", "bf16_gradients": True},
        {"strategy": "ridge", "use_gpu": True},
    ],
    ids=lambda settings: str(settings["strategy"]),
)
def test_a_run_validates_as_on_the_cpu(small_store: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    there = run_train(config(small_store, tmp_path / "gpu", **settings))
    here = run_train(config(small_store, tmp_path / "cpu", **(settings | {"use_gpu": False})))
    exact = settings.get("precision", "fp32") == "fp32"
    for key in ("loss", "cos_sim_mean"):
        assert there["val"][key] == pytest.approx(here["val"][key], rel=1e-3 if exact else 2e-2)


def test_a_killed_worker_resumes_and_ends_as_one_that_was_not(small_store: Path, tmp_path: Path) -> None:
    cfg = config(small_store, tmp_path / "killed", strategy="lightweight", use_gpu=True, num_epochs=6)
    killed: list[int] = []

    def kill() -> None:
        while not (cfg.folder / "checkpoints" / "epoch_0002").is_dir():
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = run_train(cfg)
    thread.join()
    assert killed
    whole = run_train(cfg.model_copy(update={"out": tmp_path / "whole"}))
    weights, expected = (load_checkpoint(Path(run["checkpoint"])).adapter.state_dict() for run in (result, whole))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


def test_more_workers_than_gpus_are_refused_before_anything_starts(small_store: Path, tmp_path: Path) -> None:
    num = torch.cuda.device_count() + 1
    with pytest.raises(ResourceError, match=f"{num} .*GPU"):
        run_train(config(small_store, tmp_path / "run", use_gpu=True, num_workers=num))


def test_judges_find_what_they_find_on_the_cpu(small_store: Path, tmp_path: Path) -> None:
    run = make_run(small_store, tmp_path / "run", steps=30)
    common = {"store": small_store, "tracking_uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    found: dict[bool, dict[str, Any]] = {}
    for use_gpu in (True, False):
        out = tmp_path / f"report-{use_gpu}"
        found[use_gpu] = run_evaluate(EvaluateConfig(checkpoint=str(run), out=out, use_gpu=use_gpu, **common))
    for key in ("cos_sim_mean", "centered_cos_sim_mean"):
        assert found[True][key] == pytest.approx(found[False][key], abs=1e-5)
    assert found[True]["cosine_accept_rate"] == found[False]["cosine_accept_rate"]
    compare_checkpoints(CompareConfig(checkpoints=(str(run),), out=tmp_path / "compared", use_gpu=True, **common))
    timed = run_benchmark(BenchmarkConfig(checkpoint=str(run), out=tmp_path / "benchmark", use_gpu=True, **common))
    assert torch.cuda.get_device_name() in json.dumps(timed) + Path(timed["files"][0]).read_text()


def test_a_sweep_runs_its_trials_and_its_winner_on_the_gpu(small_store: Path, tmp_path: Path) -> None:
    lines = {
        "store": str(small_store),
        "out": str(tmp_path / "sweep"),
        "use_gpu": True,
        "search_alg": "grid",
        "scheduler": "none",
        "base": {"strategy": "lightweight", "num_epochs": 2, "batch_size": 8, "dropout": 0.0},
        "space": {"hidden_dim": [8, 16]},
        "num_final_seeds": 1,
    }
    lines["tracking_uri"] = f"sqlite:///{tmp_path / 'mlflow.db'}"
    result = run_tune(TuneConfig.model_validate(lines))
    assert [trial["status"] for trial in result["trials"]] == ["finished"] * 2
    assert result["final"]["test"]


# --- the endpoint ---


def test_a_model_in_service_answers_in_bf16_as_in_float32_on_the_cpu(small_store: Path, tmp_path: Path) -> None:
    run = make_run(small_store, tmp_path / "run", steps=10)
    source = model_source(str(run / "checkpoints" / "epoch_0001"), None)
    identity = source.current()
    with source.files(identity) as folder:
        served = load_served(folder, identity, "auto", use_gpu=True, max_batch=8)
        plain = load_served(folder, identity, "fp32", use_gpu=False, max_batch=8)
    assert (served.device.type, served.precision) == ("cuda", "bf16")
    event = torch.rand(5, plain.config.event_dim)
    with torch.inference_mode():
        torch.testing.assert_close(served.forward(event).cpu(), plain.forward(event), atol=3e-2, rtol=3e-2)


def test_the_endpoint_answers_from_the_gpu(small_store: Path, tmp_path: Path) -> None:
    run = make_run(small_store, tmp_path / "run", steps=10)
    event = PairStore.open(small_store).read_rows(np.arange(2))[0] / np.float32(255)
    expected = load_checkpoint(run / "checkpoints" / "epoch_0001").adapter(torch.tensor(event)).detach().numpy()
    server = RayServer(str(run), "--use-gpu", "--precision", "fp32")
    try:
        body, headers = binary_request(event)
        status, answered, data = server.ask("POST", INFER, body, headers)
        assert status == 200, data[:500]
        aligned = np.frombuffer(data[int(answered["inference-header-content-length"]) :], "<f4").reshape(2, -1)
        np.testing.assert_allclose(aligned, expected, atol=1e-4)
        assert server.json("GET", "/v1/model")[1]["device"].startswith("cuda")
    finally:
        server.stop()
