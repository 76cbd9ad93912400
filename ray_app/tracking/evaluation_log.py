"""Evaluations of the test part on the MLflow run that trained the checkpoint."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from ray_app.config.base import TrackingFlags
from ray_app.parsing.redact import redact
from ray_app.tracking.mlflow_logger import TRACKING_ERRORS, failure_cause, flat_params, run_of_key
from ray_app.tracking.uri import database_file, tracking_uri

EVALUATION_METRICS = (
    *("pairs", "cos_sim_mean", "cos_sim_std", "cosine_accept_rate", "lift", "lift_by_theta", "centered_cos_sim_mean"),
    *("retrieval", "tokens_per_target_pass", "gain"),
)
"""Numbers of an evaluation that are metrics of the run."""


def log_evaluation(
    cfg: TrackingFlags, run_key: str | None, result: Mapping[str, Any], files: Sequence[Path]
) -> str | None:
    """Log an evaluation of the test part on the run that trained the checkpoint: metrics `test/…`, tags, files.

    Return the id of that run; None if this server has none, or is away, which is said on standard error. A database
    that does not exist is not created.
    """
    uri = tracking_uri(cfg)
    if run_key is None or ((file := database_file(uri)) and not file.exists()):
        return None
    try:
        client = MlflowClient(uri)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        run_id = run_of_key(client, run_key, experiments)
        if run_id is None:
            return None
        now_ms, step = int(time.time() * 1000), 0
        numbers = {key: result[key] for key in EVALUATION_METRICS if key in result}
        named = {key.replace("@", "_at_"): value for key, value in flat_params(numbers, "test").items()}
        points = [Metric(key, value, now_ms, step) for key, value in named.items()]  # MLflow takes no @
        tags = {f"test.{key}": str(result[key]) for key in ("best_baseline", "test_fingerprint", "verdict")}
        client.log_batch(run_id, metrics=points, tags=[RunTag(key, value) for key, value in tags.items()])
        for path in files:
            client.log_artifact(run_id, str(path), "evaluation")
    except TRACKING_ERRORS as error:
        print(f"tracking: {redact(uri)} did not take the evaluation ({failure_cause(error)})", file=sys.stderr)
        return None
    return run_id
