"""Settings of the endpoint: arguments, and config.yaml field by field, since Ray ignores unknown keys."""

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from endpoints import make_checkpoint
from pydantic import BaseModel
from ray.serve._private import application_state
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from ray_app import cli
from ray_app.commands.serve.command import environment, resolved
from ray_app.commands.serve.haproxy import write_binary
from ray_app.config.serve import EndpointConfig, ServeConfig
from ray_app.errors import CheckpointError, ConfigError, RegistryError
from serve.app import build_app, checked_config, local_app
from serve.deployment import DEPLOYMENT, replica_options

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())


def require_known(values: dict[str, Any], schema: type[BaseModel]) -> None:
    assert set(values) <= set(schema.model_fields), (
        f"{schema.__name__} ignores {set(values) - set(schema.model_fields)}"
    )


def test_config_yaml_holds_nothing_that_ray_would_ignore() -> None:
    require_known(CONFIG, ServeDeploySchema)
    require_known(CONFIG["http_options"], HTTPOptionsSchema)
    require_known(CONFIG["logging_config"], LoggingConfig)
    for application in CONFIG["applications"]:
        require_known(application, ServeApplicationSchema)
        for deployment in application["deployments"]:
            require_known(deployment, DeploymentSchema)
            assert deployment["name"] == DEPLOYMENT
    parsed = ServeDeploySchema(**CONFIG)
    assert parsed.applications[0].import_path == "serve.app:build_app"
    assert EndpointConfig.model_validate(CONFIG["applications"][0]["args"])


def test_replica_options_are_ones_that_ray_knows() -> None:
    for cfg in (EndpointConfig(), EndpointConfig(num_replicas=2, max_replicas=5)):
        options = {"name": DEPLOYMENT, **replica_options(cfg)}
        require_known(options, DeploymentSchema)
        assert DeploymentSchema(**options)
    require_known(options["autoscaling_config"], AutoscalingConfig)


def test_the_builder_takes_checked_arguments_alone(tmp_path: Path) -> None:
    checkpoint = str(make_checkpoint(tmp_path / "checkpoint"))
    good = {"checkpoint": checkpoint, "no_auth": True}
    assert build_app(good)
    for changes, message in (
        ({"max_bach": 8}, "argument 'max_bach'.*known are checkpoint"),
        ({"max_batch": 0}, "argument 'max_batch'"),
        ({"num_replicas": 3, "max_replicas": 2}, "must be at least --num-replicas"),
        ({"no_auth": False}, "need 'token_file'"),
        ({"token_file": str(tmp_path / "none"), "no_auth": False}, "cannot be read"),
        ({"checkpoint": "models:/alignment-adapter"}, "does not name a model"),
        ({"checkpoint": "models:/alignment-adapter@champion"}, "tracking_uri"),
        ({"checkpoint": "models:/a@b", "tracking_uri": "sqlite:///mlflow.db"}, "absolute path"),
        ({"checkpoint": str(tmp_path / "none")}, "neither a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            checked_config({**good, **changes})
        with pytest.raises(RayServeException, match=message):
            build_app({**good, **changes})
    assert checked_config(good).checkpoint == checkpoint


def test_a_deployment_that_cannot_start_is_refused_once_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray builds it: what it returns here it does not try again, what it raises it tries four times."""
    good, damaged = make_checkpoint(tmp_path / "good"), make_checkpoint(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    build = application_state.build_serve_application._function
    monkeypatch.setattr(application_state, "configure_component_logger", lambda **_: None)  # there is no Ray here
    for args, message in (
        ({"checkpoint": str(good), "max_bach": 8}, r"argument 'max_bach'"),
        ({"checkpoint": str(damaged)}, r"model\.safetensors is damaged"),
    ):
        args = {**args, "no_auth": True}
        _, built, reason = build("serve.app:build_app", "1", "alignment", args, LoggingConfig(), None, {}, {}, {})
        assert built is None
        assert re.search(message, reason)
        assert len(reason.splitlines()) == 1


def test_a_damaged_checkpoint_is_refused_before_anything_starts(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    weights = checkpoint / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        local_app(resolved(ServeConfig(checkpoint=str(checkpoint))))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--checkpoint", "none"], CheckpointError, "none is not a folder"),
        (["--host", "0.0.0.0"], ConfigError, "reachable by other machines"),
        (["--tls-cert", "cert.pem"], ConfigError, "need each other"),
        (["--tls-cert", "c", "--tls-key", "k", "--http-proxy", "haproxy"], ConfigError, "does not support TLS"),
        (["--checkpoint", "models:/none@champion", "--tracking-uri", "sqlite:///{}/new.db"], RegistryError, "none"),
    ],
)
def test_the_command_says_what_it_cannot_do(tmp_path: Path, flags: list[str], error: type, message: str) -> None:
    flags = [flag.format(tmp_path) for flag in flags]

    def start() -> None:
        cfg = cli.parse("serve", cli.COMMANDS["serve"], None, flags)
        assert isinstance(cfg, ServeConfig)
        local_app(resolved(cfg))

    with pytest.raises(error, match=message):
        start()


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy runs on Linux alone")
def test_haproxy_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    """Started through the environment's program, as Ray starts it; here the binary is a Python that sleeps."""
    program = write_binary(tmp_path, sys.executable)
    sleeper = "import time; print('started', flush=True); time.sleep(60)"
    parent = f"import subprocess; subprocess.run([{str(program)!r}, '-c', {sleeper!r}], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    process.kill()
    assert process.stdout.read() == b""  # the sleeper was the last that held it
    assert process.wait() == -signal.SIGKILL


def test_two_endpoints_on_one_machine_do_not_share_haproxys_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (environment(tmp_path / name, haproxy=True) for name in ("one", "two"))
    own = [
        key
        for key in one
        if key.startswith("RAY_SERVE_HAPROXY") and key.endswith(("_LOC", "_PATH", "_BASE", "_FILE", "_PORT"))
    ]
    assert len(own) == 8
    own += [key for key in one if "DIRECT_INGRESS_M" in key and "PORT" in key]
    assert len(own) == 10
    assert all(one[key] != two[key] for key in own)
    assert environment(tmp_path, haproxy=False)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
