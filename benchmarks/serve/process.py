"""Servers as processes of their own, for the benchmarks: started, waited for, looked at, ended."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from mlflow_process import free_port

from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.registry import build_adapter
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.manifest import Features, FeatureSpec

BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0


@contextlib.contextmanager
def process(command: Sequence[str], ready_url: str, log: Path | None = None) -> Iterator[psutil.Process]:
    """Run a command in a session of its own until the block ends. RuntimeError: it did not start."""
    written = log or Path(tempfile.mkstemp(prefix="serve-", suffix=".log")[1])
    path = f"{BIN}:{os.environ['PATH']}"  # mlflow calls uvicorn by its name
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with written.open("w") as stream:
        started = subprocess.Popen(
            list(command), stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + START_S
        while not answers(ready_url):
            if started.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(command)} did not start:\n{written.read_text()[-3000:]}")
            time.sleep(0.2)
        yield psutil.Process(started.pid)
    finally:
        started.terminate()  # it alone: a server that has lost its own processes cannot end in order
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        if log is None:
            written.unlink()


def answers(url: str) -> bool:
    """Whether there is an answer 200."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def endpoint(checkpoint: str | Path, *flags: str, log: Path | None = None) -> Iterator[tuple[str, psutil.Process]]:
    """`ray-app serve`: (address, its process)."""
    base = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(BIN / "ray-app"), "serve", "--checkpoint", str(checkpoint), "--port", str(port), *flags]
    with process(command, f"{base}/v2/health/ready", log) as running:
        yield base, running


def checkpoint_of(folder: Path, width: int, hidden: int, seed: int = 0, shape: tuple[int, ...] | None = None) -> Path:
    """Save a new, untrained `lightweight` adapter; `shape` makes its features images."""
    if not folder.exists():
        spec = FeatureSpec(dtype="uint8", shape=shape or (width,), scale=1 / 255)
        adapter = build_adapter(AdapterConfig("lightweight", width, width, hidden), seed)
        save_checkpoint(
            folder, adapter, metrics={}, provenance={"seed": seed}, features=Features(event=spec, target=spec)
        )
    return folder


def scraped(base: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that bear these labels."""
    total = 0.0
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as reply:
        for line in reply.read().decode().splitlines():
            series, _, value = line.rpartition(" ")
            if series.split("{")[0] == name and all(f'{key}="{wanted}"' in series for key, wanted in labels.items()):
                total += float(value)
    return total


def tree(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that came of it."""
    return [process, *process.children(recursive=True)]
