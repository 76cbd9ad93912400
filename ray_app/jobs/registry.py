"""Where checkpoints are found: a folder, a run's best, or a version in the model registry."""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlflow import MlflowClient

from ray_app.config import TrackingFlags
from ray_app.errors import CheckpointError, RegistryError
from ray_app.jobs.run_folder import BEST, RUN, RunFolder
from ray_app.jobs.tracking import TRACKING_ERRORS, shown, tracking_uri

MODEL = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@contextmanager
def checkpoint_folder(checkpoint: str, cfg: TrackingFlags) -> Iterator[Path]:
    """The folder of a checkpoint argument; one that had to be downloaded is there until the block ends.

    `models:/NAME@ALIAS` and `models:/NAME/VERSION` are looked up at the tracking server (RegistryError), all else
    is a checkpoint folder or the folder of a run, whose best checkpoint is meant (CheckpointError).
    """
    if checkpoint.startswith("models:"):
        match = MODEL.fullmatch(checkpoint)
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
        yield best_of_run(Path(checkpoint))


def best_of_run(folder: Path) -> Path:
    """A run folder's best checkpoint; any other folder as it is."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name a checkpoint, or the folder of a run.")
    if not (folder / RUN).is_file():
        return folder
    try:
        best = RunFolder(folder).best()
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / BEST} is damaged: it names no checkpoint ({error}).") from error
    if best is None:
        raise CheckpointError(f"{folder} is a run without a finished epoch: it has no checkpoint yet.")
    return best


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
            f"{shown(str(error).splitlines()[0])} (tracking server: {shown(tracking_uri(cfg))}; --tracking-uri "
            "chooses another)"
        ) from error
