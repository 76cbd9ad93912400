"""Where models come from: an alias or version in MLflow's registry, or a checkpoint in a folder or at a URI.

Only plain artifacts are taken (safetensors, JSON), by the digest that was noted at promotion. Nothing that the
registry holds is run or unpickled.
"""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ray_app.config.base import MODEL_URI
from ray_app.errors import CheckpointError, RegistryError
from ray_app.store.atomic import sha256_bytes
from ray_app.store.checkpoint import CHECKSUMS_FILE
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.store.filesystem import open_storage

from .loaded_model import Identity

POLL_INTERVAL_S = 2.0
"""How long a look waits for an object store; the next one comes anyway."""


class Source(Protocol):
    """Names the model that should be served now, and brings its files."""

    def current(self) -> Identity:
        """RegistryError, StoreError: what holds it is away, or has no such model. CheckpointError: there is none."""

    def files(self, identity: Identity) -> AbstractContextManager[Path]:
        """A folder with the checkpoint, there until the block ends."""


class PathSource:
    """A checkpoint in a folder of this machine, or at a URI."""

    def __init__(self, where: str) -> None:
        self._where, self._there = where, open_storage(where, POLL_INTERVAL_S)

    def current(self) -> Identity:
        try:
            digest = sha256_bytes(self._there.read(CHECKSUMS_FILE))
        except OSError as error:
            raise CheckpointError(f"{self._there} is not a checkpoint: it has no {CHECKSUMS_FILE}.") from error
        return Identity(version=digest[:12], digest=digest, source=str(self._there).rpartition("/")[2])

    def files(self, identity: Identity) -> AbstractContextManager[Path]:  # noqa: ARG002
        return local_folder(self._where)


class RegistrySource:
    """`models:/NAME@ALIAS`, which may move, or `models:/NAME/VERSION`, which does not."""

    def __init__(self, uri: str, tracking_uri: str) -> None:
        match = MODEL_URI.fullmatch(uri)
        assert match is not None, "checked by EndpointConfig"
        self.uri, self._tracking_uri = uri, tracking_uri
        self._name, self._alias, self._version = match["name"], match["alias"], match["version"]
        self._client: Any = None

    def current(self) -> Identity:
        with self._answers():
            if self._alias:
                version = self._registry().get_model_version_by_alias(self._name, self._alias)
            else:
                version = self._registry().get_model_version(self._name, self._version)
        tags = dict(version.tags)
        if "checkpoint_sha256" not in tags:
            raise CheckpointError(
                f"{self._name} version {version.version} does not tell which checkpoint it is (tag "
                "checkpoint_sha256); register it with `ray-app promote`."
            )
        run_id, _, path = str(version.source).removeprefix("runs:/").partition("/")
        if not str(version.source).startswith("runs:/") or not path or ".." in path.split("/"):
            raise CheckpointError(
                f"{self._name} version {version.version} lies at {version.source}, not in the artifacts of a run; "
                "register it with `ray-app promote`."
            )
        return Identity(
            version=str(version.version),
            digest=tags["checkpoint_sha256"],
            source=self.uri,
            run_id=run_id,
            tags={**tags, "artifact_path": path},
        )

    @contextmanager
    def files(self, identity: Identity) -> Iterator[Path]:
        assert identity.run_id
        assert identity.tags
        with tempfile.TemporaryDirectory(prefix="ray-app-serve-") as scratch:
            with self._answers():
                path = self._registry().download_artifacts(identity.run_id, identity.tags["artifact_path"], scratch)
            folder = Path(path)
            if irregular := [str(item) for item in folder.iterdir() if item.is_symlink() or not item.is_file()]:
                raise CheckpointError(
                    f"{identity.source}: {irregular[0]} is no plain file; a checkpoint has no other."
                )
            yield folder

    def _registry(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(self._tracking_uri)
        return self._client

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """What MLflow refuses, or that it does not answer, as RegistryError."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise RegistryError(f"{self.uri}: {first}") from error


def source_of(checkpoint: str, tracking_uri: str | None) -> Source:
    """By the form of the argument."""
    if checkpoint.startswith("models:"):
        assert tracking_uri is not None, "checked by EndpointConfig"
        return RegistrySource(checkpoint, tracking_uri)
    return PathSource(checkpoint)
