"""Entry points of the endpoint: `build_app(args)` for serve/config.yaml, `local_app` for `ray-app serve`.

Ray's builder accepts unknown arguments silently and retries a failing build three times. So arguments and model are
checked here before anything starts, and an error is raised once, as one sentence.
"""

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.exceptions import RayServeException

from ray_app.config.serve import EndpointConfig
from ray_app.errors import ConfigError, RayAppError
from ray_app.store.filesystem import absolute, open_storage
from ray_app.store.token_file import read_tokens

from .deployment import application
from .model.encoders import load_encoders
from .model.loaded_model import load_served
from .model.model_source import model_source


def build_app(args: dict[str, Any]) -> serve.Application:
    """Check arguments and model, then build the app. RayServeException, which Ray does not retry: what to change."""
    try:
        cfg = checked_config(args)
        require_registered_model(cfg)
    except RayAppError as error:
        raise RayServeException(str(error)) from error
    return application(cfg)


def checked_config(args: Mapping[str, Any]) -> EndpointConfig:
    """Parse the arguments. ConfigError: an unknown one, or one with which no replica could start."""
    try:
        cfg = EndpointConfig.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(EndpointConfig.model_fields)
        argument = ".".join(map(str, first["loc"]))
        raise ConfigError(f"argument '{argument}': {first['msg']}; known are {known}.") from error
    if cfg.token_file is None and not cfg.no_auth:
        raise ConfigError(
            "arguments need 'token_file' (`ray-app serve-token create` writes one), or 'no_auth: true' behind a "
            "gateway that authenticates."
        )
    if cfg.token_file:
        read_tokens(cfg.token_file)
    return with_model(cfg)


def local_app(cfg: EndpointConfig) -> serve.Application:
    """Build the app of `ray-app serve`, which needs no token on loopback.

    ConfigError, CheckpointError, RegistryError: it could not start.
    """
    if cfg.token_file:
        read_tokens(cfg.token_file)
    known = {name: getattr(cfg, name) for name in EndpointConfig.model_fields}
    cfg = with_model(EndpointConfig.model_validate(known))
    require_registered_model(cfg)
    return application(cfg)


def require_registered_model(cfg: EndpointConfig) -> None:
    """Load model and encoders once. CheckpointError, RegistryError, StoreError, InputError: no replica could start.

    Ray would restart a replica that cannot load again and again, with the reason only in its log.
    """
    source = model_source(cfg.checkpoint, cfg.tracking_uri)
    identity = source.current()
    with source.files(identity) as folder:
        model = load_served(folder, identity, "fp32", use_gpu=False, max_batch=1)
    load_encoders(cfg, model.features, "cpu")


def with_model(cfg: EndpointConfig) -> EndpointConfig:
    """Resolve the places of checkpoint and encoders for every replica.

    ConfigError: no tracking server, or no such folder.
    """
    folders = {name: getattr(cfg, name) for name in ("event_encoder", "target_encoder")}
    cfg = cfg.model_copy(update={name: folder and folder.absolute() for name, folder in folders.items()})
    if not cfg.checkpoint.startswith("models:"):
        if not open_storage(cfg.checkpoint).exists():
            raise ConfigError(f"checkpoint '{cfg.checkpoint}' is neither a folder here nor models:/NAME@ALIAS.")
        return cfg.model_copy(update={"checkpoint": absolute(cfg.checkpoint)})
    uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or (uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")):
        raise ConfigError("tracking_uri must name the MLflow server (or a database by its absolute path).")
    return cfg.model_copy(update={"tracking_uri": uri})
