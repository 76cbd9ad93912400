"""Where checkpoints are found, and where they are kept: a folder, a run's best, a version in the model registry."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ray_app.config.base import MODEL_URI, TrackingFlags
from ray_app.errors import CheckpointError, RegistryError
from ray_app.runs.run_dir import RUN, best_name
from ray_app.store.atomic import sha256_file
from ray_app.store.checkpoint import CHECKSUMS_FILE, Checkpoint, verify_folder
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.store.filesystem import open_storage
from ray_app.tracking.mlflow_logger import (
    ARTIFACTS,
    TRACKING_ERRORS,
    experiment_id,
    redact_password,
    run_of_key,
    tracking_uri,
)


@contextmanager
def checkpoint_folder(checkpoint: str, cfg: TrackingFlags) -> Iterator[Path]:
    """The folder of a checkpoint argument; one that had to be downloaded is there until the block ends.

    `models:/NAME@ALIAS` and `models:/NAME/VERSION` are looked up at the tracking server (RegistryError), all else
    is the place of a checkpoint or of a run, whose best checkpoint is meant (CheckpointError).
    """
    if checkpoint.startswith("models:"):
        match = MODEL_URI.fullmatch(checkpoint)
        if match is None:
            raise RegistryError(
                f"'{checkpoint}' is no model; write models:/NAME@ALIAS or models:/NAME/VERSION, for instance "
                "models:/alignment-adapter@champion."
            )
        with registry_errors(cfg):
            client = MlflowClient(tracking_uri(cfg))
            if match["alias"]:
                version = client.get_model_version_by_alias(match["name"], match["alias"])
            else:
                version = client.get_model_version(match["name"], match["version"])
        with downloaded(client, str(version.source), cfg) as folder:
            yield folder
    else:
        with local_folder(best_of_run(checkpoint)) as folder:
            yield folder


def best_of_run(where: str) -> str:
    """The place of a run's best checkpoint; any other as it is. CheckpointError: nothing is there."""
    there = open_storage(where)
    try:
        names = there.listdir()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{there} is not a folder; name a checkpoint, or the folder of a run.") from error
    if RUN not in names:
        return where
    best = best_name(there)
    if best is None:
        raise CheckpointError(f"{there} is a run without a finished epoch: it has no checkpoint yet.")
    return there.uri_of(best)


@contextmanager
def downloaded(client: MlflowClient, source: str, cfg: TrackingFlags) -> Iterator[Path]:
    """A copy of the artifact folder `runs:/RUN/PATH`, removed when the block ends."""
    run_id, _, path = source.removeprefix("runs:/").partition("/")
    with tempfile.TemporaryDirectory(prefix="ray-app-") as scratch:
        with registry_errors(cfg):
            folder = Path(client.download_artifacts(run_id, path, scratch))
        yield folder


@contextmanager
def registry_errors(cfg: TrackingFlags) -> Iterator[None]:
    """What MLflow refuses, and that it does not answer, as RegistryError with the server's name."""
    try:
        yield
    except TRACKING_ERRORS as error:
        raise RegistryError(
            f"{redact_password(str(error).splitlines()[0])} "
            f"(tracking server: {redact_password(tracking_uri(cfg))}; --tracking-uri chooses another)"
        ) from error


def registered_versions(client: MlflowClient, model: str) -> list[ModelVersion]:
    """The versions of a model by number; none where there is no such model."""
    return sorted(client.search_model_versions(f"name='{model}'"), key=lambda version: int(version.version))


def version_of(client: MlflowClient, model: str, model_sha256: str) -> ModelVersion | None:
    """The version with these weights, or None."""
    same = (v for v in registered_versions(client, model) if v.tags.get("model_sha256") == model_sha256)
    return next(same, None)


def ensure_uploaded(cfg: TrackingFlags, client: MlflowClient, checkpoint: Checkpoint) -> str:
    """The run whose artifacts are this checkpoint, made where there is none.

    RegistryError if what comes back from there is not what was sent.
    """
    run_id = find_source_run(client, checkpoint)
    if run_id is None:
        name = f"promote-{checkpoint.sha256[:10]}"
        run_id = str(client.create_run(experiment_id(client, cfg), run_name=name).info.run_id)
        client.log_artifacts(run_id, str(checkpoint.folder), ARTIFACTS)
        client.set_terminated(run_id)
    source = source_of(run_id)
    with downloaded(client, source, cfg) as folder:
        if verify_folder(folder) != checkpoint.sha256:
            raise RegistryError(f"{source} is another checkpoint than {checkpoint.folder}; promote it again.")
    return run_id


def source_of(run_id: str) -> str:
    """Where a run's checkpoint lies, as a version names it."""
    return f"runs:/{run_id}/{ARTIFACTS}"


def all_experiments(client: MlflowClient) -> list[str]:
    """Ids of the experiments that are not deleted."""
    return [experiment.experiment_id for experiment in client.search_experiments()]


def find_source_run(client: MlflowClient, checkpoint: Checkpoint) -> str | None:
    """The checkpoint's own run, if this server knows it and its artifacts are this very checkpoint."""
    key = checkpoint.provenance.get("run_key")
    run_id = run_of_key(client, key, all_experiments(client)) if key else None
    if run_id is None:
        return None
    with tempfile.TemporaryDirectory(prefix="ray-app-") as scratch:
        try:
            sums = client.download_artifacts(run_id, f"{ARTIFACTS}/{CHECKSUMS_FILE}", scratch)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run_id if sha256_file(Path(sums)) == checkpoint.sha256 else None
