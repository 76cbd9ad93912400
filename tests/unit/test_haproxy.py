"""HAProxy's configuration, as Ray writes it and as it is run: closed to other machines, and answers in JSON."""

import json
import re
import socket
import threading
from pathlib import Path

import pytest
from mlflow_process import free_port
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions

from ray_app.commands.serve import command
from ray_app.commands.serve.haproxy import completed, unavailable
from ray_app.config.serve import ServeConfig
from ray_app.errors import ResourceError


def by_ray(folder: Path, host: str) -> str:
    """The configuration of the Ray that is installed."""
    cfg = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=8123),
        socket_path=str(folder / "a"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "m"),
        is_head=True,
    )
    api = HAProxyApi(cfg, config_file_path=str(folder / "haproxy.cfg"))
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


@pytest.mark.parametrize(("host", "bound"), [("127.0.0.1", "127.0.0.1:8123"), ("0.0.0.0", "*:8123")])
def test_only_the_endpoint_itself_listens_where_it_was_asked_to(tmp_path: Path, host: str, bound: str) -> None:
    config = completed(by_ray(tmp_path, host), tmp_path / "503.http")
    binds = re.findall(r"^ *bind (\S+)$", config, re.MULTILINE)
    assert len(binds) == 3
    assert bound in binds
    assert all(bind.startswith("127.0.0.1:") for bind in binds if bind != bound)
    assert re.search(r"stats socket \S+ mode 600 level admin", config)


def test_headers_have_a_time_limit_and_without_a_replica_the_answer_is_503_in_json(tmp_path: Path) -> None:
    error_file = tmp_path / "503.http"
    config = completed(by_ray(tmp_path, "127.0.0.1"), error_file)
    defaults = config.partition("defaults\n")[2].partition("\nfrontend")[0]
    assert re.search(r"^ *timeout http-request 10s$", defaults, re.MULTILINE)
    files = dict(re.findall(r"errorfile (\d+) (\S+)", defaults))
    assert files == dict.fromkeys(("502", "503", "504"), str(error_file))
    unknown_path = config.partition("\nbackend default_backend\n")[2].partition("\nlisten")[0]
    assert unknown_path.split() == ["http-request", "deny", "deny_status", "503"]
    head, _, body = unavailable().partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"Retry-After: 1" in head
    problem = json.loads(body)
    assert (problem["status"], problem["code"], problem["error"]) == (503, "unavailable", problem["detail"])


def test_another_form_of_configuration_is_not_run_half_closed(tmp_path: Path) -> None:
    config = (
        by_ray(tmp_path, "127.0.0.1")
        .replace("listen stats", "listen statistics")
        .replace("frontend prom", "frontend x")
    )
    with pytest.raises(ValueError, match="no line like"):
        completed(config, tmp_path / "503.http")


def test_an_endpoint_whose_proxy_does_not_come_back_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROXY_RESTART_S", 0.1)
    cfg, stop = ServeConfig(port=free_port()), threading.Event()
    with pytest.raises(ResourceError, match=rf"nothing has listened on 127\.0\.0\.1:{cfg.port} .*Connection refused"):
        command.wait(cfg, stop)
    with socket.create_server(("127.0.0.1", cfg.port)):
        threading.Timer(2.5, stop.set).start()
        command.wait(cfg, stop)
    assert stop.is_set()
