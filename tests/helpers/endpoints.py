"""Endpoints for tests: all of one but Ray, behind a real HTTP server in a thread; and `ray-app serve` itself."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from mlflow_process import free_port

from ray_app.config.serve import EndpointConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec
from serve.http.routes import build_api
from serve.model.hot_reload import ReloadResult
from serve.replica import ReplicaState

SHAPE = (3, 16, 16)
WIDTH = 768
INFER = "/v2/models/alignment-adapter/infer"
START_S = 400.0


def make_checkpoint(folder: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE, metrics: Any = None) -> Path:
    """A narrow `lightweight` adapter on pixels."""
    spec = FeatureSpec(dtype="uint8", shape=shape, scale=1 / 255)
    adapter = build_adapter(AdapterConfig("lightweight", spec.width, spec.width, hidden_dim=16), seed).eval()
    save_checkpoint(
        folder,
        adapter,
        metrics=metrics or {},
        provenance={"argv": ["ray-app", "train"], "run": "test", "dataset_fingerprint": "f" * 64},
        features=Features(event=spec, target=spec),
    )
    return folder


class Server:
    """An endpoint's address, and how to speak to it without a library."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port, self.url, self.token = port, f"127.0.0.1:{port}", token

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 30.0,
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers in lower case, body). A dictionary is sent as JSON."""
        sent = dict(headers or {})
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent.setdefault("content-type", "application/json")
        if self.token:
            sent.setdefault("authorization", f"Bearer {self.token}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        """(status, JSON of the body)."""
        status, _, data = self.ask(method, path, body, **more)
        return status, json.loads(data)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the series of this name whose labels include these."""
        text = self.ask("GET", "/metrics")[2].decode()
        lines = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if all(f'{k}="{v}"' in line for k, v in labels.items())
        )


class LocalServer(Server):
    """Everything but Ray, under uvicorn in a thread of this process."""

    def __init__(self, cfg: EndpointConfig) -> None:
        super().__init__(free_port())
        self.endpoint = ReplicaState(cfg, "test")

        self.others: list[Any] = []
        """What other replicas answer to a broadcast, or raise."""

        async def everywhere(method: str) -> list[Any]:
            telemetry, rows = self.endpoint.telemetry, self.endpoint.batcher.queued_rows
            if method == "reload":
                outcome = await self.endpoint.reload(retry_refused=True)
                own: Any = ReloadResult(outcome, self.endpoint.reloader.reason(outcome))
            else:
                own = telemetry.snapshot(rows) if method == "snapshot" else telemetry.exposition(rows).decode()
            return [own, *self.others]

        options = uvicorn.Config(
            build_api(self.endpoint, everywhere), port=self.port, log_level="warning", timeout_graceful_shutdown=5
        )
        self._uvicorn = uvicorn.Server(options)
        self._thread = threading.Thread(target=self._uvicorn.run, daemon=True)

    @contextmanager
    def running(self) -> Iterator["LocalServer"]:
        self._thread.start()
        while not self._uvicorn.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        yield self
        self._uvicorn.should_exit = True
        self._thread.join(START_S)


@contextmanager
def local_server(checkpoint: Path | str, **settings: Any) -> Iterator[LocalServer]:
    """An endpoint over a checkpoint, in fp32 so that answers can be compared to the last digits."""
    cfg = EndpointConfig(checkpoint=str(checkpoint), **{"precision": "fp32", **settings})
    with LocalServer(cfg).running() as server:
        yield server


class RayServer(Server):
    """`ray-app serve` in a process of its own."""

    def __init__(self, checkpoint: str, *flags: str, token: str | None = None, own_group: bool = False) -> None:
        super().__init__(free_port(), token)
        command = [sys.executable, "-m", "ray_app", "serve", "--checkpoint", checkpoint, "--port", str(self.port)]
        root = Path(__file__).resolve().parents[2]
        self.process = subprocess.Popen(
            [*command, *flags],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
            start_new_session=own_group,
        )
        assert self.process.stderr is not None
        self.said: list[str] = []
        deadline = time.monotonic() + START_S
        while not any(line.startswith("serving ") for line in self.said):
            line = self.process.stderr.readline()
            assert line, f"it ended: {''.join(self.said)}"
            assert time.monotonic() < deadline, "".join(self.said)
            self.said.append(line)
        threading.Thread(target=self.said.extend, args=(self.process.stderr,), daemon=True).start()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(START_S)


def wait_for(true: Callable[[], object]) -> None:
    """Until it is so, at most 20 s."""
    deadline = time.monotonic() + START_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def binary_request(event: Any, outputs: tuple[str, ...] = ("aligned",)) -> tuple[bytes, dict[str, str]]:
    """A v2 request of one FP32 tensor, written by hand: (body, headers)."""
    rows = np.ascontiguousarray(event, "<f4")
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "event",
                    "shape": list(rows.shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": rows.nbytes},
                }
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in outputs],
        }
    ).encode()
    return header + rows.tobytes(), {"Inference-Header-Content-Length": str(len(header))}
