"""A real MLflow server on a loopback port, that can be killed and started again over the same database."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

from ray_app.runs.event_log import entries
from ray_app.tracking.mlflow_logger import to_metrics

START_S = 400.0


def free_port() -> int:
    """A port of the loopback interface that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class MlflowServer:
    """`mlflow server` over a SQLite file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.words = ["--workers=1", "--host=127.0.0.1", f"--port={self.port}"]
        self.words += [f"--backend-store-uri=sqlite:///{folder}/server.db"]
        self.words += [f"--artifacts-destination={folder / 'artifacts'}"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *self.words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, **self.environment},
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                assert time.monotonic() < deadline, "the MLflow server did not start"
                assert self._process.poll() is None, "the MLflow server ended"
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def missing_and_extra(run: Path, uri: str, run_id: str) -> tuple[int, int]:
    """Points of an event log that the server lacks, and points that it has beyond the log."""
    client = MlflowClient(uri)
    logged = Counter((m.key, m.step, m.timestamp, m.value) for line in entries(run) for m in to_metrics(line))
    stored = Counter(
        (m.key, m.step, m.timestamp, m.value)
        for key in client.get_run(run_id).data.metrics
        for m in client.get_metric_history(run_id, key)
    )
    return (logged - stored).total(), (stored - logged).total()
