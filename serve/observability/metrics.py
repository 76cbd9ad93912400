"""What a replica tells of itself: Prometheus series in a registry of its own, and its part of `/v1/stats`."""

import time
from collections import Counter as Tally
from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ray_app.core.metrics import THETA
from ray_app.core.promotion_policy import accept

from ..model.batcher import BatchTimes
from ..model.loaded_model import ServedModel
from ..model.predict import Answer
from .stats import Snapshot, drift

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
COSINES = tuple(round(-1 + 0.05 * i, 2) for i in range(41))
BYTES = tuple(10**k for k in range(2, 9))
ASKED = {"/v1/align", "/v1/verify", "/v2/models/{model}/infer"}
"""Routes that the live numbers are of: not those of who looks at them."""
RECENT_S = 60.0
"""Latencies of /v1/stats are of the last minute."""
RATE_S = 10.0
"""Its rates are of the last ten seconds."""
KEPT = 20_000
"""Requests remembered at most."""
LIVE_PAIRS = 2_000
"""Newest verified pairs that are compared with the test part's."""


class Telemetry:
    """Counters, histograms and the last minute. Called from one event loop."""

    def __init__(self, replica: str) -> None:
        self.replica, self.began = replica, time.time()
        self.registry = CollectorRegistry()
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=KEPT)
        self._codes: Tally[str] = Tally()
        self._cosines: deque[float] = deque(maxlen=LIVE_PAIRS)
        self._pairs = self._verified = self._accepted = 0
        self._cos_sum = 0.0
        self._model: ServedModel | None = None

        def made(kind: Any, name: str, help: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            series = kind(name, help, ("replica", *labels), registry=self.registry, **more)
            return series if labels else series.labels(replica)

        self._requests = made(
            Counter, "align_requests_total", "Answers", ("route", "method", "code", "model_version")
        )
        self._seconds = made(Histogram, "align_request_seconds", "Time of a request", ("route",), buckets=SECONDS)
        self._queue_seconds = made(Histogram, "align_queue_seconds", "Wait for a forward pass", buckets=SECONDS)
        self._compute_seconds = made(Histogram, "align_compute_seconds", "Time of a forward pass", buckets=SECONDS)
        self._batch_rows = made(Histogram, "align_batch_rows", "Pairs in a forward pass", buckets=ROWS)
        self._body_bytes = made(Histogram, "align_body_bytes", "Bytes of a request", buckets=BYTES)
        self._rejected = made(Counter, "align_rejected_total", "Requests not answered", ("reason",))
        self._pairs_total = made(Counter, "align_pairs_total", "Pairs aligned", ("model_version",))
        self._verified_total = made(
            Counter, "align_verified_total", "Pairs that came with a target", ("model_version", "accepted")
        )
        self._cos_sim = made(Histogram, "align_cos_sim", "Their cosines", ("model_version",), buckets=COSINES)
        self._reloads = made(Counter, "align_reloads_total", "Looks at the model source", ("outcome",))
        self._queue_rows = made(Gauge, "align_queue_rows", "Pairs waiting")
        self._in_flight = made(Gauge, "align_in_flight", "Requests being answered")
        self._drift = made(Gauge, "align_drift_psi", "Stability index of live cosines against the test part")
        self._info = made(
            Gauge, "align_model_info", "1 for the model in service", ("version", "digest", "run_id", "precision")
        )
        self._loaded = made(Gauge, "align_model_loaded_timestamp_seconds", "When it was ready")
        self.in_flight = 0

    def request(self, route: str, method: str, code: int, version: str, seconds: float, pairs: int) -> None:
        """One answer."""
        self._requests.labels(self.replica, route, method, str(code), version).inc()
        self._seconds.labels(self.replica, route).observe(seconds)
        self._codes[str(code)] += 1
        if route in ASKED:
            self._recent.append((time.monotonic(), seconds, pairs))

    def body(self, num_bytes: int) -> None:
        """One body that was read."""
        self._body_bytes.observe(num_bytes)

    def rejected(self, reason: str) -> None:
        """One request that was refused, by the code of its problem."""
        self._rejected.labels(self.replica, reason).inc()

    def batch(self, times: BatchTimes) -> None:
        """One forward pass."""
        self._batch_rows.observe(times.rows)
        self._compute_seconds.observe(times.compute_s)
        for queued_s in times.queued_s:
            self._queue_seconds.observe(queued_s)

    def answered(self, answer: Answer, rows: int) -> None:
        """Pairs of one answer; verified ones are judged at θ 0.80 whatever the caller's threshold."""
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
        """Which model is in service from now on."""
        identity = model.identity
        self._info.clear()
        self._info.labels(
            self.replica, identity.version, identity.digest, identity.run_id or "", model.precision
        ).set(1)
        self._loaded.set(model.loaded_at.timestamp())
        self._model = model
        self._cosines.clear()

    def reload(self, outcome: str) -> None:
        """One look at the model source."""
        self._reloads.labels(self.replica, outcome).inc()

    def snapshot(self, queue_rows: int) -> Snapshot:
        """Its part of `/v1/stats`."""
        now = time.monotonic()
        recent = [(when, seconds, pairs) for when, seconds, pairs in self._recent if now - when <= RECENT_S]
        lately = [pairs for when, _, pairs in recent if now - when <= RATE_S]
        span = min(RATE_S, max(time.time() - self.began, 1.0))
        return Snapshot(
            uptime_s=time.time() - self.began,
            codes=Tally(self._codes),
            request_rate=len(lately) / span,
            pair_rate=sum(lately) / span,
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
        """Prometheus text."""
        self._queue_rows.set(queue_rows)
        self._in_flight.set(self.in_flight)
        psi = drift(self._cosines, self._model.evaluation_record)["psi"] if self._model else None
        self._drift.set(float("nan") if psi is None else psi)
        return generate_latest(self.registry)
