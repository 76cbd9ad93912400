"""Sources of the served model: an alias or version in MLflow's registry, or a checkpoint in a folder or at a URI.

Only plain artifacts are loaded (safetensors, JSON), by the digest recorded at promotion. Nothing in the registry is
executed or unpickled.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from ray_app.errors import CheckpointError
from ray_app.store.atomic import CHECKSUMS_FILE, sha256_bytes
from ray_app.store.checkpoint_transfer import local_folder
from ray_app.store.filesystem import open_storage
from ray_app.store.scratch import scratch_dir

from .loaded_model import Identity

POLL_INTERVAL_S = 2.0
"""Seconds that a check waits for an object store."""


class ModelSource(Protocol):
    """Identifies the model that should be served now and provides its files."""

    def current(self) -> Identity:
        """Identify the current model. RegistryError, StoreError: unreachable or absent. CheckpointError: invalid."""

    def files(self, identity: Identity) -> AbstractContextManager[Path]:
        """Yield a folder with the checkpoint, which exists until the block ends."""


class PathSource:
    """A checkpoint in a folder of this machine, or at a URI."""

    def __init__(self, location: str) -> None:
        self._location, self._storage = location, open_storage(location, POLL_INTERVAL_S)

    def current(self) -> Identity:
        try:
            digest = sha256_bytes(self._storage.read(CHECKSUMS_FILE))
        except OSError as error:
            raise CheckpointError(f"{self._storage} is not a checkpoint: it has no {CHECKSUMS_FILE}.") from error
        return Identity(version=digest[:12], digest=digest, source=str(self._storage).rpartition("/")[2])

    def files(self, identity: Identity) -> AbstractContextManager[Path]:  # noqa: ARG002
        return local_folder(self._location)


class RegistrySource:
    """`models:/NAME@ALIAS`, which may change, or `models:/NAME/VERSION`, which does not."""

    def __init__(self, uri: str, tracking_uri: str) -> None:
        self.uri, self._tracking_uri = uri, tracking_uri
        self._client: Any = None

    def current(self) -> Identity:
        from ray_app.tracking.model_registry import artifact_path, find_version

        with self._registry() as client:
            version = find_version(client, self.uri)
        run_id, path = artifact_path(version)
        if "checkpoint_sha256" not in version.tags:
            raise CheckpointError(
                f"{version.name} version {version.version} does not say which checkpoint it is (tag "
                "checkpoint_sha256); register it with `ray-app promote`."
            )
        return Identity(
            version=str(version.version),
            digest=version.tags["checkpoint_sha256"],
            source=self.uri,
            run_id=run_id,
            tags={**version.tags, "artifact_path": path},
        )

    @contextmanager
    def files(self, identity: Identity) -> Iterator[Path]:
        from ray_app.tracking.model_registry import download_checkpoint

        assert identity.run_id
        assert identity.tags
        with scratch_dir() as scratch:
            with self._registry() as client:
                folder = download_checkpoint(client, identity.run_id, identity.tags["artifact_path"], scratch)
            yield folder

    @contextmanager
    def _registry(self) -> Iterator[Any]:
        """Yield MLflow's client; its errors and timeouts become RegistryError."""
        # Not for a checkpoint in a folder: MLflow takes seconds to import.
        from ray_app.tracking.mlflow_logger import connect
        from ray_app.tracking.model_registry import registry_errors

        with registry_errors(self._tracking_uri):
            self._client = self._client or connect(self._tracking_uri)
            yield self._client


def model_source(checkpoint: str, tracking_uri: str | None) -> ModelSource:
    """Choose the source by the form of the argument."""
    if checkpoint.startswith("models:"):
        assert tracking_uri is not None, "checked by EndpointConfig"
        return RegistrySource(checkpoint, tracking_uri)
    return PathSource(checkpoint)
