"""The Ray side of a replica: made once per process, asked for its health, told to look for a new model."""

import sys
from typing import Any

import ray
import torch
from ray import serve
from starlette.types import ASGIApp

from ray_app.config.serve import EndpointConfig

from .http.asgi import AsgiApp
from .http.haproxy_error_page import write_page
from .http.middleware import BypassMiddleware
from .http.routes import build_api
from .http.v2 import infer
from .observability.stats import Snapshot
from .observability.tracing import Tracing
from .replica_state import ReplicaState

DEPLOYMENT = "alignment"
WEIGHTS_A_THREAD = 16_000_000
SWITCH_S = 0.0005
"""How long one thread keeps Python's lock from another: event loop and forward pass hand it to and fro, and Python's
own 5 ms are longer than a small pass. At width 4,096 with 16 callers it gave 10 % more requests a second."""


@serve.ingress()
class Replica:
    """Loads the model before it takes a request: a replica that cannot load never starts."""

    def __init__(self, settings: dict[str, object]) -> None:
        cfg = EndpointConfig.model_validate(settings)
        context = serve.get_replica_context()
        self._app_name, name = context.app_name, context.replica_id.unique_id
        torch.set_num_threads(max(1, int(cfg.cpus_per_replica)))
        self.endpoint = ReplicaState(cfg, name)
        torch.set_num_threads(threads_for(self.endpoint.model.parameters, int(cfg.cpus_per_replica)))
        sys.setswitchinterval(SWITCH_S)
        self.tracing = Tracing(cfg.traces, name)
        write_page(ray.get_runtime_context().get_node_id())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray Serve sends requests to."""
        BypassMiddleware.edge = AsgiApp(
            self.endpoint, infer, build_api(self.endpoint, self._everywhere), self.tracing
        )
        return BypassMiddleware.edge

    async def _everywhere(self, method: str) -> list[object]:
        if self.endpoint.cfg.num_replicas == 1:
            return [await getattr(self, method)()]
        handle = serve.get_deployment_handle(DEPLOYMENT, self._app_name)
        results = await handle.broadcast(method).results_async(timeout_s=60.0, return_exceptions=True)
        return [result for result in results if not isinstance(result, Exception)]

    async def reload(self) -> str:
        """Looks at the model source, a version that was refused included."""
        return await self.endpoint.reload(again=True)

    async def snapshot(self) -> Snapshot:
        """This replica's part of `/v1/stats`."""
        return self.endpoint.telemetry.snapshot(self.endpoint.batcher.queued_rows)

    async def exposition(self) -> str:
        """Prometheus text of this replica."""
        return self.endpoint.telemetry.exposition(self.endpoint.batcher.queued_rows).decode()

    def check_health(self) -> None:
        """Whether this process can answer. Never whether MLflow can: its outage must not restart what works."""
        if not self.endpoint.batcher.healthy():
            raise RuntimeError("the forward pass does not come back")

    def __del__(self) -> None:
        if hasattr(self, "tracing"):
            self.tracing.close()


def threads_for(parameters: int, cpus: int) -> int:
    """Threads of the forward pass, begun after this is set: one for each `WEIGHTS_A_THREAD`, at most `cpus`.

    A pass of a millisecond does not gain by a second thread, and loses much where that thread has to wait for a core.
    """
    return max(1, min(cpus, 1 + parameters // WEIGHTS_A_THREAD))


def replica_options(cfg: EndpointConfig) -> dict[str, Any]:
    """How Ray runs the replicas. Its own limits stand behind ours, which answer in JSON and at once."""
    return {
        "num_replicas": cfg.num_replicas,
        "ray_actor_options": {"num_cpus": cfg.cpus_per_replica, "num_gpus": 1 if cfg.use_gpu else 0},
        "max_ongoing_requests": 1024,
        "max_queued_requests": -1,
        "max_surge_percent": 100,  # a changed replica starts before the old one ends
        "graceful_shutdown_timeout_s": 60.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,  # in a flood of requests it answers late; to replace it then would lose them
        "logging_config": {"enable_access_log": False},
    }


def application(cfg: EndpointConfig) -> serve.Application:
    """The app of one deployment."""
    deployment = serve.deployment(name=DEPLOYMENT, **replica_options(cfg))(Replica)
    return deployment.bind(cfg.model_dump(mode="json"))
