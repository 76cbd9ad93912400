"""Settings of the endpoint and of `serve`."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ray_app.config.base import MODEL_URI, Config, Positive
from ray_app.errors import ConfigError


class EndpointConfig(Config):
    """Settings of the endpoint, shared by `ray-app serve`, serve/config.yaml and the app's builder."""

    checkpoint: str = "models:/alignment-adapter@champion"
    """models:/NAME@ALIAS, which is checked for new versions, models:/NAME/VERSION, or the folder or URI of a
    checkpoint or run, such as s3://bucket/run."""
    tracking_uri: str | None = None
    """MLflow tracking URI; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current folder."""
    name: str = Field(default="alignment-adapter", pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Name of the model in requests."""
    token_file: Path | None = None
    """File of bearer tokens, one per line; required unless the endpoint is bound to loopback."""
    no_auth: bool = False
    """Disable authentication; use only behind a gateway that authenticates."""
    num_replicas: Positive = 1
    """Number of replicas: processes that answer requests."""
    max_replicas: Positive | None = None
    """Largest number of replicas: Ray adds some while requests wait; default: --num-replicas."""
    event_encoder: Path | None = None
    """Folder of the encoder that made the model's event features, verified by SHA-256: the endpoint then takes
    recordings and pictures and encodes them; without it, features."""
    target_encoder: Path | None = None
    """The same for the target's features and pictures."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward pass; auto: bf16 where the hardware multiplies it (AMX, AVX-512 BF16, GPUs)."""
    use_gpu: bool = False
    """Give each replica one GPU."""
    cpus_per_replica: float = Field(default=1.0, gt=0.0)
    """CPUs of each replica, which limit the threads of its forward pass."""
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 32
    """Largest number of pairs in a request, and in a forward pass."""
    max_queue: Annotated[int, Field(ge=1)] = 16
    """Pairs that may wait for a forward pass; while that many wait, requests are answered 429."""
    batch_wait_timeout_ms: float = Field(default=0.0, ge=0.0, le=1000.0)
    """Time in ms that an idle replica waits for more pairs before it computes."""
    max_body_mib: float = Field(default=32.0, gt=0.0)
    """Largest request body in MiB, as sent and inflated."""
    max_json_mib: float = Field(default=8.0, gt=0.0)
    """Largest JSON request in MiB; parsing JSON delays all other requests, binary ones do not."""
    max_bodies_mib: float = Field(default=256.0, gt=0.0)
    """Memory in MiB that the bodies of all requests in progress may take; beyond it they are answered 429."""
    timeout_s: float = Field(default=10.0, gt=0.0)
    """Time limit of a request in seconds; a client may ask for less."""
    reload_interval_s: float = Field(default=10.0, gt=0.0)
    """Seconds between two checks of the alias or folder for a new model."""
    traces: Path | None = None
    """File to append OpenTelemetry spans to, one JSON object each; OTEL_EXPORTER_OTLP_ENDPOINT sends them instead."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.checkpoint.startswith("models:") and not MODEL_URI.fullmatch(self.checkpoint):
            raise ConfigError(
                f"--checkpoint '{self.checkpoint}' does not name a model; write models:/NAME@ALIAS or "
                "models:/NAME/VERSION, for instance models:/alignment-adapter@champion."
            )
        if self.token_file and self.no_auth:
            raise ConfigError("--token-file and --no-auth contradict each other; give only one of them.")
        if self.max_bodies_mib < self.max_body_mib:
            raise ConfigError(
                f"--max-bodies-mib ({self.max_bodies_mib:g}) must be at least --max-body-mib ({self.max_body_mib:g})."
            )
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ConfigError(
                f"--max-replicas ({self.max_replicas}) must be at least --num-replicas ({self.num_replicas})."
            )
        return self

    @property
    def most_replicas(self) -> int:
        """Largest number of replicas at any time."""
        return self.max_replicas or self.num_replicas


class ServeConfig(EndpointConfig):
    """Serve a champion or checkpoint over HTTP on this machine, until Ctrl-C or SIGTERM.

    It starts its own Ray and ignores RAY_ADDRESS; on a cluster run: serve deploy serve/config.yaml
    """

    host: str = "127.0.0.1"
    """Interface to listen on; anything but loopback needs --token-file."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    cpus_per_replica: float = Field(default=0.0, ge=0.0)
    """CPUs of each replica, a limit of its threads; 0: this machine's CPUs, divided by the replicas."""
    http_proxy: Literal["auto", "haproxy", "python"] = "auto"
    """Proxy in front of the replicas; auto: HAProxy on Linux, Ray's Python proxy elsewhere and for TLS."""
    tls_cert: Path | None = None
    """Certificate chain (PEM); the endpoint then answers HTTPS only."""
    tls_key: Path | None = None
    """Private key (PEM) of --tls-cert."""

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key need each other; give both.")
        if self.tls_cert and self.http_proxy == "haproxy":
            raise ConfigError(
                "--http-proxy haproxy does not support TLS; leave it out, or terminate TLS in front of it."
            )
        if not (self.token_file or self.no_auth or self.loopback):
            raise ConfigError(
                f"--host {self.host} is reachable by other machines: give --token-file FILE (`ray-app serve-token "
                "create` writes one), or --no-auth behind a gateway that authenticates."
            )
        return self

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the endpoint."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return True for `localhost` and the addresses of the loopback interface, not for names that resemble them."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class ServeTokenConfig(Config):
    """Add a bearer token to the endpoint's token file and print its secret once."""

    name: str
    """Name of the token's holder, as shown in logs and metrics."""
    token_file: Path
    """File to add it to; created with mode 0600 if it does not exist."""
    scopes: tuple[Literal["infer", "admin"], ...] = ("infer",)
    """Permissions of the token: `infer` for requests, `admin` also for /v1/reload."""
