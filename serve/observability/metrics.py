"""Metrics of one replica: Prometheus series in its own registry, and its part of `/v1/stats`."""

import time
from collections import Counter as Tally
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ray_app.core.metrics import THETA
from ray_app.core.promotion_policy import accept

from ..model.batcher import BatchTimes
from ..model.loaded_model import ServedModel
from ..model.predict import InferenceResult
from .stats import Snapshot, drift

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
COSINES = tuple(round(-1 + 0.05 * i, 2) for i in range(41))
BYTES = tuple(10**k for k in range(2, 9))
INFERENCE_ROUTES = {"/v1/align", "/v1/verify", "/v2/models/{model}/infer"}
"""Routes counted in the live numbers; reading the numbers does not change them."""
RECENT_S = 60.0
"""Seconds over which /v1/stats reports latencies."""
RATE_S = 10.0
"""Seconds over which /v1/stats reports rates."""
MAX_RECENT = 20_000
"""Largest number of requests kept for /v1/stats."""
LIVE_PAIRS = 2_000
"""Number of newest verified pairs that are compared with the test part."""


class Telemetry:
    """Counters, histograms and recent requests. Called from one event loop."""

    def __init__(self, replica: str) -> None:
        self.replica, self.started = replica, time.time()
        self.registry = CollectorRegistry()
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=MAX_RECENT)
        self._codes: Tally[str] = Tally()
        self._cosines: deque[float] = deque(maxlen=LIVE_PAIRS)
        self._pairs = self._verified = self._accepted = 0
        self._cos_sum = 0.0
        self._model: ServedModel | None = None

        def series(kind: Any, name: str, help: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            metric = kind(name, help, ("replica", *labels), registry=self.registry, **more)
            return metric if labels else metric.labels(replica)

        self._requests = series(
            Counter, "align_requests_total", "Answers", ("route", "method", "code", "model_version")
        )
        self._seconds = series(Histogram, "align_request_seconds", "Time of a request", ("route",), buckets=SECONDS)
        self._queue_seconds = series(Histogram, "align_queue_seconds", "Wait for a forward pass", buckets=SECONDS)
        self._compute_seconds = series(Histogram, "align_compute_seconds", "Time of a forward pass", buckets=SECONDS)
        self._batch_rows = series(Histogram, "align_batch_rows", "Pairs in a forward pass", buckets=ROWS)
        self._body_bytes = series(Histogram, "align_body_bytes", "Bytes of a request", buckets=BYTES)
        self._rejected = series(Counter, "align_rejected_total", "Requests not answered", ("reason",))
        self._pairs_total = series(Counter, "align_pairs_total", "Pairs aligned", ("model_version",))
        self._verified_total = series(
            Counter, "align_verified_total", "Pairs that came with a target", ("model_version", "accepted")
        )
        self._cos_sim = series(
            Histogram, "align_cos_sim", "Cosines of verified pairs", ("model_version",), buckets=COSINES
        )
        self._reloads = series(Counter, "align_reloads_total", "Checks of the model source", ("outcome",))
        self._queue_rows = series(Gauge, "align_queue_rows", "Pairs waiting")
        self._in_flight = series(Gauge, "align_in_flight", "Requests being answered")
        self._drift = series(Gauge, "align_drift_psi", "Stability index of live cosines against the test part")
        self._info = series(
            Gauge, "align_model_info", "1 for the model in service", ("version", "digest", "run_id", "precision")
        )
        self._loaded = series(Gauge, "align_model_loaded_timestamp_seconds", "Time when it was ready")
        self.in_flight = 0

    def request(self, route: str, method: str, code: int, version: str, seconds: float, pairs: int) -> None:
        """Record an answer."""
        self._requests.labels(self.replica, route, method, str(code), version).inc()
        self._seconds.labels(self.replica, route).observe(seconds)
        self._codes[str(code)] += 1
        if route in INFERENCE_ROUTES:
            self._recent.append((time.monotonic(), seconds, pairs))

    def body(self, num_bytes: int) -> None:
        """Record the size of a body."""
        self._body_bytes.observe(num_bytes)

    def rejected(self, reason: str) -> None:
        """Record a refused request by its error code."""
        self._rejected.labels(self.replica, reason).inc()

    def batch(self, times: BatchTimes) -> None:
        """Record a forward pass."""
        self._batch_rows.observe(times.rows)
        self._compute_seconds.observe(times.compute_s)
        for queued_s in times.queued_s:
            self._queue_seconds.observe(queued_s)

    def answered(self, answer: InferenceResult, rows: int) -> None:
        """Record the pairs of an answer; verified ones count at θ 0.80, whatever threshold the client sent."""
        version = answer.model.version
        self._pairs += rows
        self._pairs_total.labels(self.replica, version).inc(rows)
        if answer.cos_B is None:
            return
        verdicts, cosines = accept(answer.cos_B, THETA).tolist(), answer.cos_B.tolist()
        histogram = self._cos_sim.labels(self.replica, version)
        for cosine, verdict in zip(cosines, verdicts, strict=True):
            histogram.observe(cosine)
            self._verified_total.labels(self.replica, version, str(verdict).lower()).inc()
        self._cosines.extend(cosines)
        self._verified += rows
        self._accepted += sum(verdicts)
        self._cos_sum += sum(cosines)

    def serving(self, model: ServedModel) -> None:
        """Record the model in service."""
        identity = model.identity
        self._info.clear()
        self._info.labels(
            self.replica, identity.version, identity.digest, identity.run_id or "", model.precision
        ).set(1)
        self._loaded.set(model.loaded_at.timestamp())
        self._model = model
        self._cosines.clear()

    def reload(self, outcome: str) -> None:
        """Record a check of the model source."""
        self._reloads.labels(self.replica, outcome).inc()

    def snapshot(self, queue_rows: int) -> Snapshot:
        """Return this replica's part of `/v1/stats`."""
        now = time.monotonic()
        recent = [(when, seconds, pairs) for when, seconds, pairs in self._recent if now - when <= RECENT_S]
        latest = [pairs for when, _, pairs in recent if now - when <= RATE_S]
        span = min(RATE_S, max(time.time() - self.started, 1.0))
        return Snapshot(
            uptime_s=time.time() - self.started,
            codes=Tally(self._codes),
            request_rate=len(latest) / span,
            pair_rate=sum(latest) / span,
            seconds=[seconds for _, seconds, _ in recent],
            pairs=self._pairs,
            queue_rows=queue_rows,
            in_flight=self.in_flight,
            verified=self._verified,
            accepted=self._accepted,
            cos_sum=self._cos_sum,
            cosines=list(self._cosines),
            digest=self._model.identity.digest if self._model else "",
        )

    def exposition(self, queue_rows: int) -> bytes:
        """Return Prometheus text."""
        self._queue_rows.set(queue_rows)
        self._in_flight.set(self.in_flight)
        psi = drift(self._cosines, self._model.evaluation_record)["psi"] if self._model else None
        self._drift.set(float("nan") if psi is None else psi)
        return generate_latest(self.registry)
