"""The model in service and its succession: a new one takes over only when it answers rightly, as one assignment."""

import asyncio
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ray_app.errors import CheckpointError, RayAppError, RegistryError, StoreError

from .loaded_model import Identity, ServedModel, load_served
from .model_source import Source

Outcome = Literal["swapped", "unchanged", "refused", "unreachable"]


@dataclass(frozen=True, slots=True)
class RejectedModel:
    """A version that was not taken into service."""

    identity: Identity
    """Which."""
    at: datetime
    """When."""
    reason: str
    """One sentence."""


@dataclass(slots=True)
class WatchStatus:
    """How the source is looked at."""

    last_checked: datetime | None = None
    """When it last answered."""
    failures: int = 0
    """How often it has not, in a row."""
    last_error: str | None = None
    """Why, the last time."""


class ModelReloader:
    """Holds the model in service. `check` looks for another; whatever goes wrong there, the present one goes on."""

    def __init__(self, source: Source, *, precision: str, use_gpu: bool, max_batch: int) -> None:
        self.source = source
        self._load = (precision, use_gpu, max_batch)
        self._turn = threading.Lock()
        self.watch = WatchStatus()
        self.refused: RejectedModel | None = None
        self.model = self._loaded(source.current())
        self.since = self.model.loaded_at
        self.watch.last_checked = datetime.now(UTC)

    async def check(self, again: bool = False) -> Outcome:
        """Looks once, in a thread. `again`: a version that was refused is tried again."""
        return await asyncio.to_thread(self._check, again)

    def _check(self, again: bool) -> Outcome:
        with self._turn:
            try:
                identity = self.source.current()
            except (RegistryError, StoreError) as error:
                self.watch.failures += 1
                self.watch.last_error = str(error)
                return "unreachable"
            except CheckpointError as error:
                identity = Identity("unknown", "", getattr(self.source, "uri", "checkpoint"))
                self.refused = RejectedModel(identity, datetime.now(UTC), str(error))
                return "refused"
            self.watch = WatchStatus(last_checked=datetime.now(UTC))
            if same(identity, self.model.identity):
                self.refused = None
                return "unchanged"
            if self.refused and same(identity, self.refused.identity) and not again:
                return "unchanged"
            try:
                model = self._loaded(identity)
                self._require_interface(model)
            except (RegistryError, StoreError) as error:  # away while it was downloaded: the next look tries again
                self.watch = WatchStatus(self.watch.last_checked, self.watch.failures + 1, str(error))
                return "unreachable"
            except (RayAppError, RuntimeError, OSError, ValueError, KeyError) as error:
                self.refused = RejectedModel(identity, datetime.now(UTC), str(error))
                return "refused"
            self.model, self.refused = model, None
            self.since = datetime.now(UTC)
            return "swapped"

    def _loaded(self, identity: Identity) -> ServedModel:
        with self.source.files(identity) as folder:
            return load_served(folder, identity, *self._load)

    def _require_interface(self, model: ServedModel) -> None:
        """CheckpointError: callers send features of this form, and would be refused after the exchange."""
        if model.features != self.model.features:
            raise CheckpointError(
                f"{model.identity.source} takes {model.features.event}, the model in service "
                f"{self.model.features.event}; start another endpoint for it."
            )

    def status(self) -> dict[str, Any]:
        """The last refusal, as JSON values."""
        if self.refused is None:
            return {}
        identity = self.refused.identity
        return {
            "version": identity.version,
            "digest": identity.digest or None,
            "at": iso_time(self.refused.at),
            "reason": self.refused.reason,
        }


def same(a: Identity, b: Identity) -> bool:
    """Two names of one thing."""
    return (a.version, a.digest) == (b.version, b.digest)


def iso_time(moment: datetime | None) -> str | None:
    """ISO 8601, to the second."""
    return moment.isoformat(timespec="seconds") if moment else None
