"""The endpoint on a cluster as users deploy it: a Serve config for `serve.app:build_app`, behind HAProxy."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from mlflow_process import free_port
from three_nodes import Nodes

from ray_app.commands.serve.command import environment

ROOT = Path(__file__).resolve().parents[2]
START_S = 400.0


@contextmanager
def behind_haproxy() -> Iterator[dict[str, str]]:
    """Yield the environment of nodes whose endpoint is behind HAProxy, which ends with them."""
    with tempfile.TemporaryDirectory(prefix="ra") as scratch:
        yield environment(Path(scratch), haproxy=True)


@contextmanager
def cluster_endpoint(nodes: Nodes, checkpoint: Path, folder: Path, cpus: float = 0.5) -> Iterator[str]:
    """Two replicas, at most one on a node, behind the head's proxy; yields the endpoint's URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    application = {
        "name": "alignment",
        "route_prefix": "/",
        "import_path": "serve.app:build_app",
        "args": {"checkpoint": str(checkpoint), "no_auth": True, "num_replicas": 2, "cpus_per_replica": cpus},
        "deployments": [{"name": "alignment", "max_replicas_per_node": 1}],
    }
    config = folder / "serve.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "proxy_location": "HeadOnly",
                "http_options": {"host": "127.0.0.1", "port": port},
                "applications": [application],
            }
        )
    )
    command = [str(Path(sys.executable).with_name("serve")), "run", str(config), "--address", nodes.address]
    variables = {**os.environ, **nodes.environment}
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + START_S
        while not replicas(url) >= 2:
            words = (folder / "serve.log").read_text()[-3000:]
            assert process.poll() is None, words
            assert time.monotonic() < until, words
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def replicas(url: str) -> int:
    """How many answer now: metrics are asked of each. 0 where nothing does."""
    try:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as reply:
            return sum(line.startswith("align_in_flight{") for line in reply.read().decode().splitlines())
    except OSError:
        return 0
