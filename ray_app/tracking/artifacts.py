"""Files and data sets of an MLflow run: its checkpoint as an MLflow model, and the store it was trained on."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

from ray_app.listing import data_in
from ray_app.store.atomic import CHECKSUMS_FILE
from ray_app.store.scratch import scratch_dir

MODEL_ARTIFACTS = "model"
"""Artifact folder of a run that holds its checkpoint as an MLflow model."""
ARTIFACTS = f"{MODEL_ARTIFACTS}/checkpoint"
"""Folder in it with the files of the checkpoint."""
DIGEST_LENGTH = 36
"""Longest digest of a data set that MLflow takes; its profile has the whole fingerprint."""


def upload_artifacts(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Upload a checkpoint as an MLflow model, its checksums last; one that is complete on the server stays."""
    if any(Path(item.path).name == CHECKSUMS_FILE for item in client.list_artifacts(run_id, ARTIFACTS)):
        return
    from ray_app.tracking.mlflow_model import history_tag, write_mlflow_model  # seconds to import

    with scratch_dir() as scratch:
        model = write_mlflow_model(folder, scratch / MODEL_ARTIFACTS, run_id)
        client.log_artifacts(run_id, f"{scratch}/{MODEL_ARTIFACTS}", MODEL_ARTIFACTS)
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in history_tag(model).items()])
    for path in sorted(data_in(folder), key=lambda path: (path.name == CHECKSUMS_FILE, path.name)):
        client.log_artifact(run_id, str(path), ARTIFACTS)


def log_dataset(client: MlflowClient, run_id: str, facts: Mapping[str, Any]) -> None:
    """Log the store of a run as its data set, with the fingerprint; MLflow keeps one of several equal ones.

    `facts`: parameters and tags of the run.
    """
    store, fingerprint = facts.get("store"), facts.get("dataset_fingerprint")
    if not store or not fingerprint:
        return
    profile = {"fingerprint": fingerprint, **{key: facts.get(key) for key in ("source", "features", "split")}}
    dataset = Dataset(
        name=PurePath(store).name,
        digest=fingerprint[:DIGEST_LENGTH],
        source_type="ray_app pair store",
        source=json.dumps({"uri": store}),
        profile=json.dumps(profile),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
