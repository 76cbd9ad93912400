"""All of a replica but HTTP: the model in service, the queue before it, keys, metrics, the watch on the source."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.types import Receive

from ray_app.config.serve import EndpointConfig

from .http.auth import TokenStore
from .http.body import chunks, drain, wait_for_disconnect
from .model.batcher import Batcher
from .model.hot_reload import ModelReloader, Outcome, iso_time
from .model.loaded_model import ServedModel
from .model.model_source import source_of
from .model.predict import Answer, InferenceRequest, predict
from .observability.metrics import Telemetry
from .protocol.open_inference import Limits
from .protocol.strict_json import DEPTH

LOG = logging.getLogger("ray.serve")
MIB = 2**20


class ReplicaState:
    """One replica's state. Made before the first request, used from one event loop."""

    def __init__(self, cfg: EndpointConfig, replica: str, prepare: Any = lambda: None) -> None:
        self.cfg, self.replica = cfg, replica
        self.keys = TokenStore(cfg.token_file)
        self.telemetry = Telemetry(replica)
        self.succession = ModelReloader(
            source_of(cfg.checkpoint, cfg.tracking_uri),
            precision=cfg.precision,
            use_gpu=cfg.use_gpu,
            max_batch=cfg.max_batch,
        )
        self.telemetry.serving(self.model)
        self.batcher = Batcher(
            lambda works: predict(self.model, works),
            max_rows=cfg.max_batch,
            max_queued_rows=cfg.max_queue,
            wait_s=cfg.batch_wait_timeout_ms / 1e3,
            observe=self.telemetry.batch,
            prepare=prepare,
        )
        self.limits = Limits(self.model.features, cfg.max_batch)
        self.max_body_bytes = int(cfg.max_body_mib * MIB)
        self.max_json_bytes = int(min(cfg.max_json_mib, cfg.max_body_mib) * MIB)
        self.closing = False
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def model(self) -> ServedModel:
        """In service now."""
        return self.succession.model

    @asynccontextmanager
    async def place(self, receive: Receive) -> AsyncIterator[None]:
        """Held while a body arrives. Problem 429 where the queue is full, once the caller has sent all of it."""
        if self.batcher.full():
            await drain(chunks(receive), self.max_body_bytes)
            raise self.batcher.queue_full_error()
        with self.batcher.reserve_slot():
            yield

    async def answer(self, work: InferenceRequest, timeout_s: float, receive: Receive | None = None) -> Answer:
        """The model's answer, counted. CancelledError: `receive`, whose body is read, says that the caller left."""
        answer = await self.batcher.answer(
            work, timeout_s, partial(wait_for_disconnect, receive) if receive else None
        )
        self.telemetry.answered(answer, work.rows)
        return answer

    async def reload(self, again: bool = False) -> Outcome:
        """One look at the source; a new model takes over if it answers rightly."""
        outcome = await self.succession.check(again)
        self.telemetry.reload(outcome)
        if outcome == "swapped":
            self.telemetry.serving(self.model)
        return outcome

    def start(self) -> None:
        """Begins to watch the source."""
        self._loop = asyncio.get_running_loop()
        self._watching = self._loop.create_task(self._watch())

    def is_here(self) -> bool:
        """Whether it may be asked from this event loop: Ray can run an app in another than its HTTP server."""
        return self._loop is asyncio.get_running_loop()

    async def close(self) -> None:
        """Answers what waits, and ends the watch."""
        self.closing = True
        if self._watching:
            self._watching.cancel()
            with suppress(asyncio.CancelledError):
                await self._watching
        self.batcher.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.cfg.reload_interval_s)
            try:
                await self.reload()
            except Exception as error:  # a defect of ours: it is told, and the next champion may be another matter
                LOG.exception("a look at the model source failed")
                self.telemetry.reload("failed")
                self.succession.watch.failures += 1
                self.succession.watch.last_error = repr(error)

    def about(self) -> dict[str, Any]:
        """`/v1/model`."""
        model, identity, watch = self.model, self.model.identity, self.succession.watch
        return {
            "name": self.cfg.name,
            "version": identity.version,
            "digest": identity.digest,
            "source": identity.source,
            "run_id": identity.run_id,
            "run_name": model.provenance.get("run"),
            "dataset_fingerprint": model.provenance.get("dataset_fingerprint"),
            "adapter": {**model.config.to_dict(), "parameters": model.parameters},
            "features": model.features.model_dump(mode="json"),
            "metrics": {"test": model.evaluation_record.test, "val": model.evaluation_record.val},
            "acceptance_curve": model.evaluation_record.curve,
            "loaded_at": iso_time(model.loaded_at),
            "serving_since": iso_time(self.succession.since),
            "serving_s": round((datetime.now(UTC) - self.succession.since).total_seconds(), 3),
            "watch": {
                "uri": self.cfg.checkpoint if self.cfg.checkpoint.startswith("models:") else None,
                "every_s": self.cfg.reload_interval_s,
                "last_checked": iso_time(watch.last_checked),
                "failures": watch.failures,
                "last_error": watch.last_error,
            },
            "refused": self.succession.status() or None,
            "tokens": {"asked_for": self.keys.path is not None, "flaw": self.keys.flaw},
            "limits": {
                "max_batch": self.cfg.max_batch,
                "max_queue_rows": self.cfg.max_queue,
                "max_body_bytes": self.max_body_bytes,
                "max_json_bytes": self.max_json_bytes,
                "json_depth": DEPTH,
                "timeout_s": self.cfg.timeout_s,
            },
            "device": str(model.device),
            "precision": model.precision,
            "replica": self.replica,
        }
