"""One replica: its model, the queue in front of it, tokens and metrics, and the Ray Serve class around them."""

import asyncio
import logging
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import torch
from ray import serve
from starlette.types import ASGIApp

from ray_app.config.serve import EndpointConfig

from .decoding.pool import DecodePool
from .http.auth import TokenStore
from .http.loopback import bind_grpc_to_loopback
from .http.routes import build_api
from .model.batcher import STUCK_S, Batcher
from .model.encoders import load_encoders, num_weights, rows_within
from .model.hot_reload import ModelReloader, ReloadOutcome, ReloadResult, iso_time
from .model.loaded_model import ServedModel
from .model.model_source import model_source
from .model.predict import InferenceRequest, InferenceResult, predict
from .observability.metrics import Telemetry
from .observability.stats import Snapshot
from .observability.tracing import Tracing
from .protocol.body import MAX_DEPTH, BodyBudget
from .protocol.open_inference import Limits

LOG = logging.getLogger("ray.serve")
DEPLOYMENT = "alignment"
MIB = 2**20
WEIGHTS_PER_THREAD = 16_000_000
SWITCH_INTERVAL_S = 0.0005
"""How long one thread may hold Python's lock. Event loop and forward pass alternate, and Python's own 5 ms are longer
than a small pass: at width 4,096 with 16 callers this gave 10 % more requests a second."""
BROADCAST_TIMEOUT_S = 60.0


class ReplicaState:
    """Everything but HTTP and Ray. Created before the first request, used from one event loop."""

    def __init__(self, cfg: EndpointConfig, name: str) -> None:
        self.cfg, self.name = cfg, name
        self.tokens = TokenStore(cfg.token_file)
        self.telemetry = Telemetry(name)
        self.tracing = Tracing(cfg.traces, name)
        self.reloader = ModelReloader(
            model_source(cfg.checkpoint, cfg.tracking_uri),
            precision=cfg.precision,
            use_gpu=cfg.use_gpu,
            max_batch=cfg.max_batch,
        )
        self.telemetry.serving(self.model)
        self.encoders = load_encoders(cfg, self.model.features, "cuda" if cfg.use_gpu else "cpu")
        self.batcher = Batcher(
            lambda works: predict(self.model, works, self.encoders),
            max_rows=rows_within(STUCK_S / 2, self.encoders, cfg.max_batch),
            max_queued_rows=cfg.max_queue,
            wait_s=cfg.batch_wait_timeout_ms / 1e3,
            observe=self.telemetry.batch,
        )
        self.decoders = DecodePool()
        self.max_body_bytes = int(cfg.max_body_mib * MIB)
        self.max_json_bytes = int(min(cfg.max_json_mib, cfg.max_body_mib) * MIB)
        self.limits = Limits(self.model.features, cfg.max_batch, self.max_json_bytes, self.encoders)
        self.bodies = BodyBudget(int(cfg.max_bodies_mib * MIB))
        self.closing = False
        self._reload_task: asyncio.Task[None] | None = None

    @property
    def model(self) -> ServedModel:
        """Model in service now."""
        return self.reloader.model

    async def answer(self, work: InferenceRequest, timeout_s: float) -> InferenceResult:
        """Return the model's answer, counted in the metrics. ApiError: see `Batcher.answer`."""
        answer = await self.batcher.answer(work, timeout_s)
        self.telemetry.answered(answer, work.rows)
        return answer

    async def reload(self, retry_refused: bool = False) -> ReloadOutcome:
        """Check the model source once; a new model takes over if its answers are right."""
        outcome = await self.reloader.check(retry_refused)
        self.telemetry.reload(outcome)
        if outcome == "swapped":
            self.telemetry.serving(self.model)
        return outcome

    def start(self) -> None:
        """Start checking the model source in the background."""
        self._reload_task = asyncio.get_running_loop().create_task(self._reload_periodically())

    async def close(self) -> None:
        """Stop the background check, the forward pass and tracing."""
        self.closing = True
        if self._reload_task:
            self._reload_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._reload_task
        self.batcher.close()
        self.decoders.close()
        self.tracing.close()

    async def _reload_periodically(self) -> None:
        while True:
            await asyncio.sleep(self.cfg.reload_interval_s)
            try:
                await self.reload()
            except Exception as error:  # a bug: report it and keep checking, the next champion may load
                LOG.exception("checking the model source failed")
                self.telemetry.reload("failed")
                self.reloader.watch.failures += 1
                self.reloader.watch.last_error = repr(error)

    def about(self) -> dict[str, Any]:
        """Answer of `/v1/model`."""
        model, identity, watch = self.model, self.model.identity, self.reloader.watch
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
            "encoders": {
                side: {"model": record.model, "sha256": record.sha256, "loaded": side in self.encoders}
                for side in ("event", "target")
                if (record := getattr(model.features, side).encoder)
            },
            "metrics": {"test": model.evaluation_record.test, "val": model.evaluation_record.val},
            "acceptance_curve": model.evaluation_record.curve,
            "loaded_at": iso_time(model.loaded_at),
            "serving_since": iso_time(self.reloader.since),
            "serving_s": round((datetime.now(UTC) - self.reloader.since).total_seconds(), 3),
            "watch": {
                "uri": self.cfg.checkpoint if self.cfg.checkpoint.startswith("models:") else None,
                "every_s": self.cfg.reload_interval_s,
                "last_checked": iso_time(watch.last_checked),
                "failures": watch.failures,
                "last_error": watch.last_error,
            },
            "refused": self.reloader.status() or None,
            "tokens": {"required": self.tokens.path is not None, "error": self.tokens.error},
            "limits": {
                "max_batch": self.cfg.max_batch,
                "max_queue_rows": self.cfg.max_queue,
                "max_body_bytes": self.max_body_bytes,
                "max_json_bytes": self.max_json_bytes,
                "max_bodies_bytes": self.bodies.max_bytes,
                "json_depth": MAX_DEPTH,
                "timeout_s": self.cfg.timeout_s,
            },
            "device": str(model.device),
            "precision": model.precision,
            "replica": self.name,
        }


@serve.ingress()
class Replica:
    """Ray Serve deployment. The model is loaded here: a replica that cannot load never starts."""

    def __init__(self, settings: dict[str, object]) -> None:
        bind_grpc_to_loopback()
        cfg = EndpointConfig.model_validate(settings)
        context = serve.get_replica_context()
        self._app_name = context.app_name
        torch.set_num_threads(max(1, int(cfg.cpus_per_replica)))
        self._state = ReplicaState(cfg, context.replica_id.unique_id)
        weights = self._state.model.parameters + num_weights(self._state.encoders)
        torch.set_num_threads(threads_for(weights, int(cfg.cpus_per_replica)))
        sys.setswitchinterval(SWITCH_INTERVAL_S)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the app that Ray Serve sends requests to."""
        return build_api(self._state, self._broadcast)

    async def _broadcast(self, method: str) -> list[object]:
        if self._state.cfg.most_replicas == 1:
            return [await getattr(self, method)()]
        handle = serve.get_deployment_handle(DEPLOYMENT, self._app_name)
        responses = handle.broadcast(method)
        return list(await responses.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True))

    async def reload(self) -> ReloadResult:
        """Check the model source now; a version that was refused is tried again."""
        outcome = await self._state.reload(retry_refused=True)
        return ReloadResult(outcome, self._state.reloader.reason(outcome))

    async def snapshot(self) -> Snapshot:
        """Numbers of this replica for `/v1/stats`."""
        return self._state.telemetry.snapshot(self._state.batcher.queued_rows)

    async def exposition(self) -> str:
        """Prometheus text of this replica."""
        return self._state.telemetry.exposition(self._state.batcher.queued_rows).decode()

    def check_health(self) -> None:
        """Raise if a forward pass or a decoder is stuck. MLflow is not checked: its outage restarts no replica."""
        if not self._state.batcher.healthy():
            raise RuntimeError("the forward pass does not return")
        if not self._state.decoders.healthy():
            raise RuntimeError("decoder processes do not start or do not end")


def threads_for(parameters: int, cpus: int) -> int:
    """Threads of the forward pass: one per `WEIGHTS_PER_THREAD`, at most `cpus`.

    A pass of a millisecond gains nothing from a second thread, and loses when that thread waits for a core.
    """
    return max(1, min(cpus, 1 + parameters // WEIGHTS_PER_THREAD))
