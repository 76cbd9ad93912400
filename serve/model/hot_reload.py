"""Hot reload: a new model takes over in one assignment, and only after it has answered its golden inputs right."""

import asyncio
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from ray_app.errors import CheckpointError, RayAppError, RegistryError, StoreError

from .loaded_model import Identity, ServedModel, load_served
from .model_source import ModelSource

MAX_REASON = 2000
"""Characters of a reason that are kept."""
ReloadOutcome = Literal["swapped", "unchanged", "refused", "unreachable"]


@dataclass(frozen=True, slots=True)
class ReloadResult:
    """Answer of one replica that was asked to check the model source."""

    outcome: ReloadOutcome
    """Outcome of the check."""
    reason: str = ""
    """Sentence about a model that was refused, or a source that does not answer."""


@dataclass(frozen=True, slots=True)
class RejectedModel:
    """A version that was refused."""

    identity: Identity
    """Refused version."""
    at: datetime
    """Time of the refusal."""
    reason: str
    """Reason, in one sentence."""


@dataclass(slots=True)
class WatchStatus:
    """State of the checks of the model source."""

    last_checked: datetime | None = None
    """Time of the last answer."""
    failures: int = 0
    """Failed checks in a row."""
    last_error: str | None = None
    """Error of the last failed check."""


class ModelReloader:
    """Owns the model in service. `check` looks for a new one; if that fails, the current one stays."""

    def __init__(self, source: ModelSource, *, precision: str, use_gpu: bool, max_batch: int) -> None:
        self.source = source
        self._load = (precision, use_gpu, max_batch)
        self._lock = threading.Lock()
        self.watch = WatchStatus()
        self.refused: RejectedModel | None = None
        self.model = self._loaded(source.current())
        self.since = self.model.loaded_at
        self.watch.last_checked = datetime.now(UTC)

    async def check(self, retry_refused: bool = False) -> ReloadOutcome:
        """Check the source once, in a thread. A version that was refused is skipped unless `retry_refused`."""
        return await asyncio.to_thread(self._check, retry_refused)

    def _check(self, retry_refused: bool) -> ReloadOutcome:
        with self._lock:
            try:
                identity = self.source.current()
            except (RegistryError, StoreError) as error:
                self.watch.failures += 1
                self.watch.last_error = str(error)
                return "unreachable"
            except CheckpointError as error:
                identity = Identity("unknown", "", getattr(self.source, "uri", "checkpoint"))
                self.refused = RejectedModel(identity, datetime.now(UTC), reason_of(error))
                return "refused"
            self.watch = WatchStatus(last_checked=datetime.now(UTC))
            if same_model(identity, self.model.identity):
                self.refused = None
                return "unchanged"
            if self.refused and same_model(identity, self.refused.identity) and not retry_refused:
                return "unchanged"
            try:
                model = self._loaded(identity)
                self._require_interface(model)
            except (RegistryError, StoreError) as error:  # lost during the download: the next check tries again
                self.watch = WatchStatus(self.watch.last_checked, self.watch.failures + 1, str(error))
                return "unreachable"
            except Exception as error:  # whatever its files hold, the model in service stays
                self.refused = RejectedModel(identity, datetime.now(UTC), reason_of(error))
                return "refused"
            self.model, self.refused = model, None
            self.since = datetime.now(UTC)
            return "swapped"

    def _loaded(self, identity: Identity) -> ServedModel:
        with self.source.files(identity) as folder:
            return load_served(folder, identity, *self._load)

    def _require_interface(self, model: ServedModel) -> None:
        """CheckpointError unless the new model takes the same features, else clients are refused after a swap."""
        if model.features != self.model.features:
            raise CheckpointError(
                f"{model.identity.source} takes {model.features.event}, the model in service "
                f"{self.model.features.event}; start another endpoint for it."
            )

    def reason(self, outcome: ReloadOutcome) -> str:
        """Return the sentence that explains the outcome of the last check."""
        if outcome == "refused" and self.refused:
            return f"version {self.refused.identity.version}: {self.refused.reason}"
        return f"the model source does not answer: {self.watch.last_error}" if outcome == "unreachable" else ""

    def status(self) -> dict[str, Any]:
        """Last refusal as JSON values, empty if there is none."""
        if self.refused is None:
            return {}
        identity = self.refused.identity
        return {
            "version": identity.version,
            "digest": identity.digest or None,
            "at": iso_time(self.refused.at),
            "reason": self.refused.reason,
        }


def reason_of(error: Exception) -> str:
    """Reason for a refusal, as text that JSON can hold, of a bounded length."""
    text = str(error) if isinstance(error, RayAppError) else f"{type(error).__name__}: {error}"
    return text[:MAX_REASON].encode("utf-8", "replace").decode()


def same_model(a: Identity, b: Identity) -> bool:
    """True if both name the same model."""
    return (a.version, a.digest) == (b.version, b.digest)


def iso_time(moment: datetime | None) -> str | None:
    """Format as ISO 8601, to the second."""
    return moment.isoformat(timespec="seconds") if moment else None
