"""Bearer tokens: named, hashed, rotated while it runs, of two scopes; and who is let in without one."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def test_the_page_gives_its_address_to_no_other_site(server: LocalServer) -> None:
    status, headers, _ = server.ask("GET", "/")
    assert (status, headers["referrer-policy"]) == (200, "no-referrer")
    assert "default-src 'none'" in headers["content-security-policy"]


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


@pytest.mark.parametrize("damage", ["emptied", "deleted", "nonsense", "latin-1", "a folder", "for all"])
def test_a_file_that_is_gone_or_damaged_lets_no_one_in_and_is_logged(
    server: LocalServer, tokens: Path, secrets: dict[str, str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tokens.read_text()
    if damage in ("deleted", "a folder"):
        tokens.unlink()
    if damage == "a folder":
        tokens.mkdir()
    elif damage == "for all":
        tokens.write_text(whole + "\n")
        tokens.chmod(0o666)
    elif damage != "deleted":
        tokens.write_bytes({"emptied": b"", "nonsense": b"nonsense\n", "latin-1": b"\xe9"}[damage])
    try:
        with caplog.at_level("WARNING", "ray.serve"):
            for secret in secrets.values():
                assert server.ask("GET", "/v1/model", headers=bearer(secret))[0] == 401
        line = next(line for line in map(json.loads, caplog.messages) if line["event"] == "tokens")
        assert (line["valid"], line["revoked"]) == (0, 2)
        assert "token" in line["error"]
    finally:
        if tokens.is_dir():
            tokens.rmdir()
        tokens.write_text(whole)
        tokens.chmod(0o600)
    assert server.json("GET", "/v1/model", headers=bearer(secrets["reader"]))[1]["tokens"]["error"] is None


def test_a_token_that_was_taken_out_is_void_though_another_line_is_damaged(
    server: LocalServer, tokens: Path, secrets: dict[str, str]
) -> None:
    whole = tokens.read_text()
    kept = "".join(line for line in whole.splitlines(keepends=True) if line.startswith("boss:"))
    tokens.write_text(kept + "typo:infer:0123\n")
    assert server.ask("GET", "/v1/model", headers=bearer(secrets["reader"]))[0] == 401
    about = server.json("GET", "/v1/model", headers=bearer(secrets["boss"]))[1]
    assert f"{tokens} line 2 is not a token" in about["tokens"]["error"]
    tokens.write_text(whole)


def test_a_file_of_windows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    append_token(file, "a", ("infer",))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b" \r\n"))
    append_token(file, "b", ("infer",))
    assert [token.name for token in read_tokens(file)] == ["a", "b"]
    file.write_bytes(file.read_text(encoding="utf-8-sig").encode("utf-16"))
    for use in (lambda: read_tokens(file), lambda: append_token(file, "c", ("infer",))):
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            use()


def test_a_token_is_added_to_whatever_file_is_there_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# of the night shift")
    file.chmod(0o600)
    for name in ("a", "b" * 64):
        append_token(file, name, ("infer",))
        text = file.read_text()
        file.write_text(text.rstrip("\n"))  # as editors leave it
    assert [token.name for token in read_tokens(file)] == ["a", "b" * 64]
    before = file.read_bytes()
    for name in ("", "c" * 65, "a b", "a\nb", "a:b", "é", "#a"):
        with pytest.raises(ConfigError, match="is not allowed"):
            append_token(file, name, ("infer",))
    assert file.read_bytes() == before
    file.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1 is not a token"):
        append_token(file, "d", ("infer",))
    with pytest.raises(ConfigError, match="cannot be written"):
        append_token(tmp_path / "none" / "tokens", "d", ("infer",))
    file.write_text("")
    file.chmod(0o622)
    with pytest.raises(ConfigError, match="written by others"):
        append_token(file, "d", ("infer",))


def test_of_two_that_add_the_same_name_one_does(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(append_token, file, f"n{i // 2}", ("infer",)) for i in range(16)]
    assert sum(future.exception() is None for future in made) == 8
    assert len(read_tokens(file)) == 8


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
    assert ServeConfig(host="::1").loopback
    for host in ("0.0.0.0", "10.0.0.7", "::", "127.evil.com", "127.1"):
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
            ({"host": f"127.evil.com:{port}"}, 403),
            ({"host": "127.0.0.1.evil.com"}, 403),
            ({"host": "127.1"}, 403),
            ({"host": "localhost:80@evil.example"}, 403),
            ({"host": "127.3.2.1"}, 200),
            ({"host": "LocalHost"}, 200),
            ({"host": "[::1]:8000"}, 200),
            ({"host": "[::2]"}, 403),
            ({"origin": f"http://127.0.0.1:{port}"}, 200),
            ({"origin": "http://localhost:3000"}, 200),
            ({"origin": "http://127.evil.com"}, 403),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
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
