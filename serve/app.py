"""`build_app(args)`: what `serve run serve.app:build_app` and serve/config.yaml start.

Ray's builder accepts unknown arguments in silence and tries a failing build three times over; arguments and model are
checked here before anything is started, and Ray is told once, in one sentence, what to change.
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
from .model.loaded_model import load_served
from .model.model_source import source_of


def build_app(args: dict[str, Any]) -> serve.Application:
    """The app of checked arguments and a model that loads. RayServeException, which Ray does not retry: why not."""
    try:
        cfg = checked(args)
        require_model(cfg)
    except RayAppError as error:
        raise RayServeException(str(error)) from error
    return application(cfg)


def checked(args: Mapping[str, Any]) -> EndpointConfig:
    """The arguments as settings. ConfigError: an unknown one, or one that every replica would stumble over."""
    try:
        cfg = EndpointConfig.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        known = ", ".join(EndpointConfig.model_fields)
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"argument '{where}': {first['msg']}; known are {known}.") from error
    if cfg.token_file is None and not cfg.no_auth:
        raise ConfigError(
            "arguments need 'token_file' (`ray-app serve-token create` writes one), or 'no_auth: true' behind a "
            "gateway that authenticates."
        )
    if cfg.token_file:
        read_tokens(cfg.token_file)
    return with_model(cfg)


def local_app(cfg: EndpointConfig) -> serve.Application:
    """The app of `ray-app serve`, which asks for no token where only this machine can reach it.

    ConfigError, CheckpointError, RegistryError: it would not start.
    """
    if cfg.token_file:
        read_tokens(cfg.token_file)
    known = {name: getattr(cfg, name) for name in EndpointConfig.model_fields}
    cfg = with_model(EndpointConfig.model_validate(known))
    require_model(cfg)
    return application(cfg)


def require_model(cfg: EndpointConfig) -> None:
    """CheckpointError, RegistryError, StoreError: no replica could serve it.

    Found by loading it once here: a replica that cannot load is tried again by Ray, and tells of it in its log alone.
    """
    source = source_of(cfg.checkpoint, cfg.tracking_uri)
    identity = source.current()
    with source.files(identity) as folder:
        load_served(folder, identity, "fp32", use_gpu=False, max_batch=1)


def with_model(cfg: EndpointConfig) -> EndpointConfig:
    """The same with a tracking server that every replica reaches. ConfigError: none, or no such folder."""
    if not cfg.checkpoint.startswith("models:"):
        if not open_storage(cfg.checkpoint).exists():
            raise ConfigError(f"checkpoint '{cfg.checkpoint}' is no folder here, and no models:/NAME@ALIAS.")
        return cfg.model_copy(update={"checkpoint": absolute(cfg.checkpoint)})
    uri = cfg.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri or (uri.startswith("sqlite:///") and not uri.startswith("sqlite:////")):
        raise ConfigError("tracking_uri must name the MLflow server (or a database by its absolute path).")
    return cfg.model_copy(update={"tracking_uri": uri})
