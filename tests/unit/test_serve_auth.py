"""Bearer tokens: named, hashed, rotated while it runs, of two scopes; and who is let in without one."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoints import WIDTH, LocalServer, local_server, make_checkpoint

from ray_app import cli
from ray_app.config.serve import ServeConfig
from ray_app.errors import ConfigError
from ray_app.store.token_file import append_token, read_tokens
from serve.http import auth

BODY = {"event": [[0.5] * WIDTH], "return": []}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auth") / "tokens"


@pytest.fixture(scope="module")
def secrets(tokens: Path) -> dict[str, str]:
    return {
        "reader": append_token(tokens, "reader", ("infer",)),
        "boss": append_token(tokens, "boss", ("infer", "admin")),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tokens: Path, secrets: dict[str, str]) -> Iterator[LocalServer]:
    assert secrets
    with local_server(make_checkpoint(tmp_path_factory.mktemp("auth") / "checkpoint"), token_file=tokens) as it:
        yield it


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "TOKEN_POLL_INTERVAL_S", 0.0)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_token_is_needed_for_all_but_health_and_the_page(server: LocalServer, secrets: dict[str, str]) -> None:
    for path in ("/v2/health/live", "/v2/health/ready", "/openapi.json"):
        assert server.ask("GET", path)[0] == 200
    for method, path in (
        ("POST", "/v1/align"),
        ("POST", "/v1/verify"),
        ("GET", "/v1/model"),
        ("GET", "/v1/stats"),
        ("GET", "/metrics"),
        ("GET", "/v2"),
        ("GET", "/v2/models/alignment-adapter"),
        ("POST", "/v2/models/alignment-adapter/infer"),
        ("POST", "/v1/reload"),
        ("GET", "/nothing"),
    ):
        status, headers, data = server.ask(method, path, BODY)
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
        assert b'"unauthorized"' in data
    assert server.json("POST", "/v1/align", BODY, headers=bearer(secrets["reader"]))[0] == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic cmVhZGVy", "Bearer wrong", "bearer", "Bearer " + "x" * 100_00]
)
def test_what_is_no_valid_token_is_not_let_in(server: LocalServer, header: str) -> None:
    assert server.ask("GET", "/v1/model", headers={"authorization": header})[0] in (401, 431)


def test_the_digest_in_the_file_is_no_token(server: LocalServer, tokens: Path) -> None:
    digest = tokens.read_text().split(":")[2].split()[0]
    assert server.ask("GET", "/v1/model", headers=bearer(digest))[0] == 401


def test_reload_takes_the_scope_admin(server: LocalServer, secrets: dict[str, str]) -> None:
    status, problem = server.json("POST", "/v1/reload", {}, headers=bearer(secrets["reader"]))
    assert (status, problem["code"]) == (403, "forbidden")
    assert server.json("POST", "/v1/reload", {}, headers=bearer(secrets["boss"]))[1]["action"] == "unchanged"


def test_tokens_are_exchanged_while_it_runs(server: LocalServer, tokens: Path, secrets: dict[str, str]) -> None:
    fresh = append_token(tokens, "fresh", ("infer",))
    assert server.ask("GET", "/v1/model", headers=bearer(fresh))[0] == 200
    lines = [line for line in tokens.read_text().splitlines() if not line.startswith("fresh:")]
    tokens.write_text("\n".join(lines) + "\n")
    assert server.ask("GET", "/v1/model", headers=bearer(fresh))[0] == 401
    assert server.ask("GET", "/v1/model", headers=bearer(secrets["reader"]))[0] == 200


def test_a_file_that_becomes_unreadable_changes_nothing_and_is_reported(
    server: LocalServer, tokens: Path, secrets: dict[str, str]
) -> None:
    whole = tokens.read_text()
    for damaged in ("nonsense\n", ""):
        tokens.write_text(damaged)
        status, about = server.json("GET", "/v1/model", headers=bearer(secrets["reader"]))
        assert status == 200
        assert "token" in about["tokens"]["error"]
    tokens.write_text(whole)
    assert server.json("GET", "/v1/model", headers=bearer(secrets["reader"]))[1]["tokens"]["error"] is None


def test_no_secret_is_kept_and_the_file_is_private(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    secret = append_token(file, "me", ("infer",))
    assert secret not in file.read_text()
    assert hashlib.sha256(secret.encode()).hexdigest() in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="already has a token 'me'"):
        append_token(file, "me", ("admin",))
    with pytest.raises(ConfigError, match="is not allowed"):
        append_token(file, "a:b", ("admin",))
    for mode in (0o622, 0o620, 0o602, 0o660):
        os.chmod(file, mode)
        with pytest.raises(ConfigError, match="written by others"):
            read_tokens(file)


@pytest.mark.parametrize(
    "text", ["me:infer:abc\n", "me:root:" + "0" * 64 + "\n", "me" + "0" * 64, "# nothing\n", "me::" + "0" * 64]
)
def test_a_line_that_is_no_token_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ConfigError, match="token"):
        read_tokens(file)


def test_tokens_are_needed_unless_only_this_machine_can_ask(tmp_path: Path) -> None:
    assert ServeConfig(host="127.0.0.1").loopback
    for host in ("0.0.0.0", "10.0.0.7", "::"):
        with pytest.raises(ConfigError, match="reachable by other machines"):
            ServeConfig(host=host)
        assert ServeConfig(host=host, token_file=tmp_path / "t")
        assert ServeConfig(host=host, no_auth=True)


def test_without_tokens_other_sites_pages_are_turned_away(tmp_path: Path) -> None:
    with local_server(make_checkpoint(tmp_path / "checkpoint")) as server:
        port = server.port
        for headers, status in (
            ({"host": f"localhost:{port}"}, 200),
            ({"host": f"127.0.0.1:{port}"}, 200),
            ({"host": "[::1]"}, 200),
            ({"host": f"evil.example:{port}"}, 403),
            ({"host": "localhost.evil.example"}, 403),
            ({"sec-fetch-site": "cross-site"}, 403),
            ({"sec-fetch-site": "same-origin"}, 200),
        ):
            assert server.ask("GET", "/v1/model", headers=headers)[0] == status, headers


def test_the_command_makes_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tokens"
    argv = ["serve-token", "create", "robot", "--token-file", str(file), "--scopes", "infer", "admin"]
    assert cli.run(argv) == 0
    assert read_tokens(file)[0].scopes == {"infer", "admin"}
    assert "not stored or shown again" in capsys.readouterr().out
