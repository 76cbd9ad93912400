"""Ray Serve's settings of the deployment: replicas, autoscaling, queue limits, health checks."""

from typing import Any

from ray import serve

from ray_app.config.serve import EndpointConfig

from .replica import DEPLOYMENT, Replica

MAX_ONGOING = 1024
"""Requests in one replica. Our own limit (`max_queue`, in pairs) refuses in JSON long before."""
MAX_QUEUED = 1024
"""Requests that wait for one of those; Ray answers more of them 429 in plain text, without reading their bodies."""


def replica_options(cfg: EndpointConfig) -> dict[str, Any]:
    """Options of `serve.deployment`."""
    return {
        **scaling(cfg),
        "ray_actor_options": {"num_cpus": cfg.cpus_per_replica, "num_gpus": 1 if cfg.use_gpu else 0},
        "max_ongoing_requests": MAX_ONGOING,
        "max_queued_requests": MAX_QUEUED,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
        "max_surge_percent": 100,  # a changed replica starts before the old one stops
        "graceful_shutdown_timeout_s": 60.0,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 30.0,  # under a flood it answers late; replacing it then would lose its requests
        "logging_config": {"enable_access_log": False},
    }


def scaling(cfg: EndpointConfig) -> dict[str, Any]:
    """A fixed number of replicas, or Ray's autoscaling by requests in progress where `max_replicas` is larger."""
    if cfg.most_replicas == cfg.num_replicas:
        return {"num_replicas": cfg.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": cfg.num_replicas,
            "max_replicas": cfg.most_replicas,
            "target_ongoing_requests": max(1, cfg.max_queue // 2),
            "upscale_delay_s": 10.0,
            "look_back_period_s": 10.0,
        }
    }


def application(cfg: EndpointConfig) -> serve.Application:
    """Return the Serve application of one deployment."""
    deployment = serve.deployment(name=DEPLOYMENT, **replica_options(cfg))(Replica)
    return deployment.bind(cfg.model_dump(mode="json"))
