"""`decode` through Ray: replicas, kills, MLflow; and `replay` predicts what was decoded."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from mlflow import MlflowClient

from ray_app.commands.decode.command import run_decode
from ray_app.commands.replay.command import run_replay
from ray_app.config.decode import DecodeConfig
from ray_app.config.speculative import ReplayConfig
from ray_app.errors import ConfigError, ResourceError

VOCABULARY = len(tiny_models.SPECIAL) + len(tiny_models.WORDS)
DRAFTERS = ("hybrid", "previous_window", "prompt_lookup", "retrieval")

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_drafter(tmp_path_factory.mktemp("models") / "target", seed=0)


def prompts(path: Path, num_rows: int) -> Path:
    """Questions of drives of ten rows each."""
    lines = [
        {"sequence": f"drive{n // 10}", "question": f"What is w{n % 3} ?", "draft_tokens": [20 + n % 4, 21]}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(target: Path, source: Path, out: Path, **changed: Any) -> DecodeConfig:
    settings: dict[str, Any] = {
        "source": (source,),
        "target": target,
        "drafter": DRAFTERS,
        "out": out,
        "num_speculative_tokens": 4,
        "max_new_tokens": 16,
        "draft_length": "fixed",
    }
    return DecodeConfig(**{**settings, **changed})


def rows_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return [
        {
            "row": line["row"],
            "tokens": line["target_tokens"],
            "passes": {name: [each[:4] for each in way["passes"]] for name, way in line["drafters"].items()},
        }
        for line in lines
    ]


@pytest.mark.slow
def test_replay_predicts_the_passes_of_a_run_and_mlflow_has_its_metrics(target: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = run_decode(
        config(target, prompts(tmp_path / "a.jsonl", 10), tmp_path / "a", drafter=("previous_window",))
    )
    assert first["results"]["previous_window"]["texts_that_differ"] == 0
    learn = (tmp_path / "a" / "traces" / "previous_window.jsonl",)
    cfg = config(
        target,
        prompts(tmp_path / "b.jsonl", 20),
        tmp_path / "b",
        drafter=(*DRAFTERS, "ngram"),
        learn_from=learn,
        tracking_uri=uri,
    )
    result = run_decode(cfg)
    how: dict[str, Any] = {"num_speculative_tokens": 4, "vocabulary": VOCABULARY, "learn_from": learn}
    traces = (tmp_path / "b" / "traces" / "hybrid.jsonl",)
    replayed = run_replay(ReplayConfig(traces=traces, drafter=(*DRAFTERS, "ngram"), folds=1, **how))
    for name, numbers in result["results"].items():
        assert replayed.report.details[name]["num_drafts"] == numbers["num_drafts"], name
    with pytest.raises(ConfigError, match=r"--learn-from takes the place of folds; add --folds 1 \(now 5\)"):
        run_replay(ReplayConfig(traces=traces, **how))
    client = MlflowClient(uri)
    run = client.get_run(result["tracked"]["ngram"])
    assert run.info.status == "FINISHED"
    assert run.data.params["drafter"] == "ngram"
    for metric in ("tokens_per_target_pass", "draft_acceptance_rate", "num_drafts", "speedup", "accepted_at_1"):
        number = result["results"]["ngram"].get(metric, result["results"]["ngram"]["num_accepted_tokens_per_pos"][0])
        assert run.data.metrics[f"validation/{metric}"] == pytest.approx(number)


@pytest.mark.slow
def test_replicas_decode_whole_drives_and_give_the_same_texts(target: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 20)
    run_decode(config(target, source, tmp_path / "two", num_workers=2, drafter=("hybrid",)))
    run_decode(config(target, source, tmp_path / "watched", watch=True, drafter=("hybrid",)))
    assert [row["tokens"] for row in rows_of(tmp_path / "two")] == [
        row["tokens"] for row in rows_of(tmp_path / "watched")
    ]
    with pytest.raises(ResourceError, match="3 replicas need 3 CPUs, the cluster has 2; take fewer --num-workers"):
        run_decode(config(target, source, tmp_path / "three", num_workers=3))


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_with_the_same_rows(target: Path, tmp_path: Path) -> None:
    source = prompts(tmp_path / "prompts.jsonl", 200)
    words = [sys.executable, "-m", "ray_app", "decode", str(source), "--target", str(target), "--drafter", "hybrid"]
    words += [
        "--num-speculative-tokens",
        "4",
        "--max-new-tokens",
        "16",
        "--draft-length",
        "fixed",
        "--watch",
        "--out",
    ]
    out = tmp_path / "killed"
    for moment in sorted(random.Random(1).sample(range(1, 20), 2)):
        run = subprocess.Popen([*words, str(out)], stdout=subprocess.DEVNULL, env=dict(os.environ))
        until = time.monotonic() + 400
        while len(list(out.glob("shards/*.sha256"))) < moment:
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert not (out / "rows.jsonl").exists()
    subprocess.run([*words, str(out)], stdout=subprocess.DEVNULL, check=True)
    run_decode(config(target, source, tmp_path / "whole", watch=True, drafter=("hybrid",)))
    assert rows_of(out) == rows_of(tmp_path / "whole")
