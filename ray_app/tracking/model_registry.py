"""Checkpoints by name: a folder, a run's best checkpoint, or a version in MLflow's model registry."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from ray_app.config.base import MODEL_URI, TrackingFlags
from ray_app.errors import CheckpointError, RegistryError
from ray_app.parsing.redact import redact
from ray_app.runs.run_dir import best_of_run
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_file, verify_folder
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.store.scratch import scratch_dir
from ray_app.tracking.artifacts import ARTIFACTS, MODEL_ARTIFACTS, upload_artifacts
from ray_app.tracking.mlflow_logger import TRACKING_ERRORS, connect, experiment_id, failure_cause, run_of_key
from ray_app.tracking.uri import tracking_uri

if TYPE_CHECKING:  # torch takes seconds to import, and a list of versions needs none of it
    from ray_app.store.checkpoint import Checkpoint

CHAMPION = "champion"
"""Alias of the version that the endpoint serves."""


@contextmanager
def checkpoint_folder(checkpoint: str, cfg: TrackingFlags) -> Iterator[Path]:
    """Folder of a checkpoint argument; a downloaded copy is removed when the block ends.

    `models:/NAME@ALIAS` and `models:/NAME/VERSION` are looked up at the tracking server (RegistryError). Anything
    else is the folder or URI of a checkpoint, or of a run, whose best checkpoint is taken (CheckpointError).
    """
    if checkpoint.startswith("models:"):
        uri = tracking_uri(cfg)
        with registry_errors(uri):
            client = connect(uri)
            version = find_version(client, checkpoint)
        with scratch_dir() as scratch:
            with registry_errors(uri):
                folder = download_checkpoint(client, *artifact_path(version), scratch)
            yield folder
    else:
        with local_folder(best_of_run(checkpoint)) as folder:
            yield folder


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """Return the version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names. RegistryError: another form."""
    match = MODEL_URI.fullmatch(uri)
    if match is None:
        raise RegistryError(
            f"'{uri}' is not a model; write models:/NAME@ALIAS or models:/NAME/VERSION, for instance "
            "models:/alignment-adapter@champion."
        )
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise RegistryError(f"'{uri}' is not in the registry: {_lacking(client, match['name'])}") from error


def _lacking(client: MlflowClient, name: str) -> str:
    """Return what a registry has instead of a version that it lacks, and the way out."""
    models = {model.name: model for model in client.search_registered_models()}
    way_out = "`ray-app promote RUN` registers a version and makes the first one champion"
    if name not in models:
        return f"it has no model '{name}'; its models: {', '.join(sorted(models)) or 'none'}. {way_out}."
    numbers = sorted(int(version.version) for version in client.search_model_versions(f"name='{name}'"))
    aliases = ", ".join(f"@{alias} (version {number})" for alias, number in models[name].aliases.items())
    versions = f"{numbers[0]} to {numbers[-1]}" if numbers else "none"
    return f"versions of '{name}': {versions}; its aliases: {aliases or 'none'}. {way_out}."


def artifact_path(version: ModelVersion) -> tuple[str, str]:
    """(run id, path below its artifacts) of a version's checkpoint. CheckpointError: it is stored anywhere else."""
    source = str(version.source)
    run_id, _, path = source.removeprefix("runs:/").partition("/")
    if path.rpartition("/")[2] == MODEL_ARTIFACTS:  # an MLflow model; else a version of before them
        path = f"{path}/{PurePath(ARTIFACTS).name}"
    if not source.startswith("runs:/") or not path or ".." in path.split("/"):
        raise CheckpointError(
            f"{version.name} version {version.version} is stored at {source}, not in the artifacts of a run; "
            "register it with `ray-app promote`."
        )
    return run_id, path


def download_checkpoint(client: MlflowClient, run_id: str, path: str, folder: Path) -> Path:
    """Copy a run's artifact folder `path` into `folder`; returns the copy. CheckpointError: not only plain files."""
    copy = Path(client.download_artifacts(run_id, path, str(folder)))
    if irregular := [str(item) for item in copy.iterdir() if item.is_symlink() or not item.is_file()]:
        raise CheckpointError(
            f"runs:/{run_id}/{path}: {irregular[0]} is not a plain file; a checkpoint holds only such."
        )
    return copy


@contextmanager
def registry_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow refuses, or its silence, into a RegistryError that names the server."""
    try:
        yield
    except TRACKING_ERRORS as error:
        raise RegistryError(
            f"{failure_cause(error)} (tracking server: {redact(uri)}; --tracking-uri chooses another)"
        ) from error


P = ParamSpec("P")
R = TypeVar("R")


def _answered(method: Callable[Concatenate["ModelRegistry", P], R]) -> Callable[Concatenate["ModelRegistry", P], R]:
    """Wrap a method in `registry_errors`."""

    @functools.wraps(method)
    def call(self: "ModelRegistry", *args: P.args, **kwargs: P.kwargs) -> R:
        with registry_errors(self.uri):
            return method(self, *args, **kwargs)

    return call


class ModelRegistry:
    """One registered model at one tracking server. Every method: RegistryError if the server refuses or is away."""

    def __init__(self, uri: str, model: str, experiment: str) -> None:
        """`experiment`: of the runs that hold checkpoints which have no run of their own."""
        self.uri, self.model, self.experiment = uri, model, experiment

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client; a database is created when it is first used."""
        return connect(self.uri)

    @property
    def address(self) -> str:
        """Tracking URI without its password."""
        return redact(self.uri)

    @_answered
    def champion(self) -> str | None:
        """Number of the version that has the alias now; None: no version, or no such model."""
        try:
            number = self.client.get_registered_model(self.model).aliases.get(CHAMPION)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return None if number is None else str(number)  # MLflow returns a number or a text

    @_answered
    def versions(self) -> list[ModelVersion]:
        """Versions in the order of their numbers; none where there is no such model."""
        found = self.client.search_model_versions(f"name='{self.model}'")
        return sorted(found, key=lambda version: int(version.version))

    @_answered
    def tags(self, number: str) -> dict[str, str]:
        """Tags of a version."""
        return dict(self.client.get_model_version(self.model, number).tags)

    def version_of(self, model_sha256: str) -> ModelVersion | None:
        """The version with these weights, or None."""
        return next((v for v in self.versions() if v.tags.get("model_sha256") == model_sha256), None)

    @contextmanager
    def download(self, number: str) -> Iterator[Path]:
        """A copy of a version's checkpoint, removed when the block ends."""
        with scratch_dir() as scratch:
            with registry_errors(self.uri):
                version = self.client.get_model_version(self.model, number)
                folder = download_checkpoint(self.client, *artifact_path(version), scratch)
            yield folder

    @_answered
    def write_version(self, version: ModelVersion | None, run_id: str, tags: Mapping[str, str]) -> str:
        """Register a version with all its tags in one request, or rewrite an old one's tags. Returns its number.

        An old one has no test fingerprint while its tags change, so half of them are never compared with.
        """
        if version is None:
            self.create_model()
            created = self.client.create_model_version(
                self.model, f"runs:/{run_id}/{MODEL_ARTIFACTS}", run_id, tags=dict(tags), await_creation_for=0
            )
            return str(created.version)
        number = str(version.version)
        last = "test_fingerprint"
        for key, value in [(last, ""), *sorted(tags.items(), key=lambda item: item[0] == last)]:
            self.tag_version(number, key, value)
        return number

    def create_model(self) -> None:
        """Create the registered model if it is missing."""
        try:
            self.client.create_registered_model(self.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @_answered
    def clear_tags(self, version: ModelVersion, *keys: str) -> None:
        """Delete those tags of a version that it has."""
        for key in keys:
            if key in version.tags:
                self.client.delete_model_version_tag(self.model, str(version.version), key)

    @_answered
    def tag_version(self, number: str, key: str, value: str) -> None:
        """Set one tag of a version."""
        self.client.set_model_version_tag(self.model, number, key, value)

    @_answered
    def move_alias(self, number: str) -> None:
        """Make a version champion: one row in the registry's database."""
        self.client.set_registered_model_alias(self.model, CHAMPION, number)

    @_answered
    def ensure_uploaded(self, checkpoint: "Checkpoint") -> str:
        """Id of the run whose artifacts are this checkpoint; uploaded to a new run if there is none.

        RegistryError: what the server returns is not what was sent.
        """
        run_id = self.find_source_run(checkpoint)
        if run_id is None:
            flags = TrackingFlags(tracking_uri=self.uri, experiment=self.experiment)
            name = f"promote-{checkpoint.sha256[:10]}"
            run_id = str(self.client.create_run(experiment_id(self.client, flags), run_name=name).info.run_id)
            upload_artifacts(self.client, run_id, checkpoint.folder)
            self.client.set_terminated(run_id)
        with scratch_dir() as scratch:
            copy = download_checkpoint(self.client, run_id, ARTIFACTS, scratch)
            if verify_folder(copy) != checkpoint.sha256:
                raise RegistryError(
                    f"runs:/{run_id}/{ARTIFACTS} is another checkpoint than {checkpoint.folder}; promote it again."
                )
        return run_id

    def find_source_run(self, checkpoint: "Checkpoint") -> str | None:
        """Id of the checkpoint's own run, if this server has it and its artifacts are this very checkpoint."""
        key = checkpoint.provenance.get("run_key")
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        run_id = run_of_key(self.client, key, experiments) if key else None
        if run_id is None:
            return None
        with scratch_dir() as scratch:
            try:
                sums = self.client.download_artifacts(run_id, f"{ARTIFACTS}/{CHECKSUMS_FILE}", str(scratch))
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
            return run_id if sha256_file(Path(sums)) == checkpoint.sha256 else None
