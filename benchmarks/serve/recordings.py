"""A recording of 300,000 events in, its aligned feature out: the parts of the answer's time.

    ray-app demo fetch mobilenet_v2
    python -m benchmarks.serve.recordings

`ray-app serve` on one core with MobileNetV2 and an untrained `token_bottleneck` on its features, 9 tokens of 1,280
numbers; one caller on one connection. Writes benchmarks/results/serve_recordings.json.
"""

import argparse
import http.client
import io
import re
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.provenance import require_commit, save
from benchmarks.serve.process import endpoint
from ray_app.commands.demo.command import cache_folder
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.encoders.base import EncoderSettings
from ray_app.encoders.registry import load_encoder
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features

EVENTS, WIDTH, HEIGHT = 300_000, 640, 480
PART = re.compile(r"(\w+);dur=([0-9.]+)")
PATH = "/v1/align?return=aligned&encoding=base64"


def recording() -> bytes:
    """Events of 50 ms all over the sensor, as `numpy.savez` writes them."""
    rng, out = np.random.default_rng(0), io.BytesIO()
    x, y = (rng.integers(0, side, EVENTS).astype(np.uint16) for side in (WIDTH, HEIGHT))
    t, p = np.sort(rng.integers(0, 50_000, EVENTS)), rng.integers(0, 2, EVENTS).astype(np.uint8)
    np.savez(out, x=x, y=y, t=t, p=p)
    return out.getvalue()


def checkpoint(folder: Path, model: Path) -> Path:
    """Save an adapter between features of the encoder."""
    spec = load_encoder(model, EncoderSettings(pool="3x3")).feature_spec("bf16")
    sides = {"event_shape": spec.shape, "target_shape": spec.shape}
    config = AdapterConfig("token_bottleneck", spec.width, spec.width, hidden_dim=256, **sides)
    adapter = build_adapter(config, 0).eval()
    save_checkpoint(folder, adapter, metrics={}, provenance={}, features=Features(event=spec, target=spec))
    return folder


def measured(base: str, requests: int) -> list[dict[str, float]]:
    """Milliseconds of the parts of each answer, by Server-Timing, and of the whole as the caller sees it."""
    body, times = recording(), []
    connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=60)
    for _ in range(requests):
        began = time.perf_counter()
        connection.request("POST", PATH, body, {"content-type": "application/octet-stream"})
        answer = connection.getresponse()
        data = answer.read()
        whole = (time.perf_counter() - began) * 1e3
        if answer.status != 200:
            raise RuntimeError(data.decode())
        parts = {name: float(ms) for name, ms in PART.findall(answer.headers["server-timing"])}
        times.append({**parts, "caller": whole})
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    require_commit()
    model = cache_folder() / "mobilenet_v2"
    with tempfile.TemporaryDirectory() as scratch:
        flags = ["--event-encoder", str(model), "--cpus-per-replica", "1"]
        with endpoint(checkpoint(Path(scratch) / "checkpoint", model), *flags) as (base, _):
            measured(base, 10)
            times = measured(base, args.requests)
    p50: dict[str, Any] = {name: round(float(np.median([one[name] for one in times])), 3) for name in times[0]}
    shares = [one["encode"] / one["caller"] for one in times]
    save(
        "serve_recordings",
        {
            "events": EVENTS,
            "recording_mb": round(len(recording()) / 1e6, 2),
            "requests": args.requests,
            "p50_ms": p50,
            "p99_ms": round(float(np.percentile([one["caller"] for one in times], 99)), 3),
            "encoding_share": round(float(np.median(shares)), 4),
        },
    )


if __name__ == "__main__":
    main()
