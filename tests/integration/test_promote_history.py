"""The log of champions tells what happened whatever was cut short, and two promotions never write at once."""

import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_process import MlflowServer

from ray_app.commands.promote import registry_lock as turn_module
from ray_app.commands.promote.champion_history import (
    AliasMove,
    ChampionLog,
    champion_stack,
    move,
    predecessor,
    read_log,
    reconcile,
)
from ray_app.commands.promote.registry_lock import tickets, turn
from ray_app.commands.promote.rollback import list_champions, roll_back
from ray_app.config.evaluate import PromoteConfig
from ray_app.errors import ConfigError, RegistryError

AT = "2027-01-01T00:00:00+00:00"


def log_of(*moves: tuple[str | None, str]) -> list[AliasMove]:
    """A log of (version, code), each from the one before."""
    before = [None, *(version for version, _ in moves)]
    return [
        AliasMove(number, version, before[number - 1], AT, code, "because")
        for number, (version, code) in enumerate(moves, 1)
    ]


@pytest.mark.parametrize(
    ("moves", "stack", "previous"),
    [
        ([], [], None),
        ([("1", "first")], ["1"], None),
        ([("1", "first"), ("2", "promoted"), ("3", "forced")], ["1", "2", "3"], "2"),
        ([("1", "first"), ("2", "promoted"), ("3", "promoted"), ("2", "rollback")], ["1", "2"], "1"),
        # Two rollbacks go two back, not back and forth.
        ([("1", "first"), ("2", "promoted"), ("3", "promoted"), ("2", "rollback"), ("1", "rollback")], ["1"], None),
        ([("1", "first"), ("2", "promoted"), ("1", "rollback"), ("3", "promoted")], ["1", "3"], "1"),
        ([("1", "first"), ("2", "promoted"), ("1", "forced"), ("2", "rollback")], ["1", "2"], "1"),
        ([("1", "first"), ("2", "found"), ("3", "promoted")], ["1", "2", "3"], "2"),
        ([("1", "first"), ("2", "promoted"), (None, "found")], ["1", "2", None], "2"),
        ([("1", "first"), ("8", "promoted"), ("3", "promoted")], ["1", "8", "3"], "1"),  # 8 was deleted
        ([("1", "first"), ("8", "promoted"), ("3", "promoted"), ("1", "rollback")], ["1"], None),
        ([("2", "rollback")], ["2"], None),  # what lay before it was lost
    ],
)
def test_a_rollback_takes_the_top_off_the_stack_of_champions(
    moves: list[tuple[str | None, str]], stack: list[str | None], previous: str | None
) -> None:
    entries = log_of(*moves)
    assert [entry.version for entry in champion_stack(entries)] == stack
    found = predecessor(entries, {"1", "2", "3"})
    assert (found.version if found else None) == previous


def test_a_log_that_disagrees_with_the_alias_says_so_and_is_settled_by_an_entry() -> None:
    entries = tuple(log_of(("1", "first"), ("2", "promoted")))
    assert ChampionLog("2", entries).flaws() == []
    assert ChampionLog(None).flaws() == []
    assert ChampionLog("2", entries).settled(AT) == ChampionLog("2", entries)
    by_hand = ChampionLog("1", entries)
    assert "alias is at version 1, but the log's last champion is version 2" in by_hand.flaws()[0]
    found = by_hand.settled(AT).last
    assert found
    assert (found.number, found.version, found.before, found.code) == (3, "1", "2", "found")
    assert "the log is empty" in ChampionLog("7").flaws()[0]
    assert "the alias is nowhere" in ChampionLog(None, entries).flaws()[0]


def test_a_tag_that_is_no_entry_is_named() -> None:
    with pytest.raises(RegistryError, match=r"champion\.0001.*mend it"):
        ChampionLog.of({}, {"champion.0001": "{}"})
    entry = log_of(("1", "first"))[0]
    assert AliasMove.from_tag("champion.0001", entry.to_tag()) == entry
    assert len(replace(entry, reason="x" * 9_000).to_tag()) < 5_000


@pytest.mark.parametrize(
    "settings", [{}, {"run": "r", "list": True}, {"rollback": True, "list": True}, {"rollback": True, "force": True}]
)
def test_promote_does_exactly_one_thing(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--rollback"):
        PromoteConfig(**settings)


# ------------------------------------------------------------------ with a real registry


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    MlflowClient(uri).search_registered_models()
    return uri


def model_of(client: MlflowClient, name: str, versions: int) -> str:
    """A model with so many versions; the id of a run."""
    run_id = client.create_run(client.create_experiment(name)).info.run_id
    client.create_registered_model(name)
    for _ in range(versions):
        client.create_model_version(name, f"runs:/{run_id}/checkpoint", run_id)
    return run_id


def settings_of(uri: str, name: str, **task: bool) -> PromoteConfig:
    return PromoteConfig(tracking_uri=uri, model_name=name, experiment=name, **task)


def champion_moves(client: MlflowClient, name: str, run_id: str, *versions: str) -> None:
    for version in versions:
        with turn(client, name, run_id, stale_s=0.0) as mine:
            move(mine, name, reconcile(mine, name, AT), version, code="promoted", reason="earned", at=AT)


def test_rollback_goes_back_again_and_again_and_the_list_tells_who_when_and_why(
    registry: str, tmp_path: Path
) -> None:
    client, name = MlflowClient(registry), tmp_path.name
    run_id = model_of(client, name, 3)
    champion_moves(client, name, run_id, "1", "2", "3")
    assert roll_back(settings_of(registry, name, rollback=True))["champion"] == "2"
    result = roll_back(settings_of(registry, name, rollback=True))
    assert (result["champion"], result["champion_before"]) == ("1", "2")
    listed = list_champions(settings_of(registry, name, list=True))
    json.dumps(listed, allow_nan=False)
    assert (listed["champion"], listed["champion_before"], listed["code"]) == ("1", None, "rollback")
    assert "back to version 1" in listed["reason"]
    assert listed["since"]
    assert [(e["from"], e["version"]) for e in listed["history"]] == [
        (None, "1"),
        ("1", "2"),
        ("2", "3"),
        ("3", "2"),
        ("2", "1"),
    ]
    assert not listed["warnings"]
    with pytest.raises(RegistryError, match="champion is version 1, and the log knows of nobody before"):
        roll_back(settings_of(registry, name, rollback=True))
    assert not tickets(client, f"{name}.lock")


def test_an_alias_moved_by_hand_is_told_and_is_where_a_rollback_starts(registry: str, tmp_path: Path) -> None:
    client, name = MlflowClient(registry), tmp_path.name
    run_id = model_of(client, name, 3)
    champion_moves(client, name, run_id, "1", "2")
    client.set_registered_model_alias(name, "champion", "3")
    listed = list_champions(settings_of(registry, name, list=True))
    assert (listed["champion"], listed["champion_before"], listed["since"]) == ("3", "2", None)
    assert "moved by other means" in listed["warnings"][0]
    client.delete_model_version(name, "2")
    result = roll_back(settings_of(registry, name, rollback=True))
    assert (result["champion"], result["champion_before"]) == ("1", "3")  # 2 is no more
    log = read_log(client, name)
    assert log
    assert [entry.code for entry in log.entries] == ["promoted", "promoted", "found", "rollback"]
    assert not log.flaws()


def test_a_version_whose_promotion_was_killed_before_the_alias_moved_is_told(registry: str, tmp_path: Path) -> None:
    client, name = MlflowClient(registry), tmp_path.name
    run_id = model_of(client, name, 2)
    for version in ("1", "2"):
        client.set_model_version_tag(name, version, "verdict_code", "promoted")
    champion_moves(client, name, run_id, "1")
    (note,) = list_champions(settings_of(registry, name, list=True))["warnings"]
    assert "version 2 earned the alias and never had it" in note


def test_a_model_that_is_not_there_is_named(registry: str) -> None:
    for ask, task in ((list_champions, "list"), (roll_back, "rollback")):
        with pytest.raises(RegistryError, match=r"no model 'nowhere'.*promote RUN"):
            ask(settings_of(registry, "nowhere", **{task: True}))


class Mortal:
    """A client of a process that is killed before its n-th write: nothing reaches the server after that."""

    def __init__(self, client: MlflowClient, writes: int) -> None:
        self._client, self._left = client, writes

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not name.startswith(("get", "search")):
                self._left -= 1
            if self._left < 0:
                raise ConnectionError("killed")
            return getattr(self._client, name)(*args, **kwargs)

        return call


@pytest.mark.parametrize("writes", range(8))
def test_a_move_that_is_killed_before_any_of_its_writes_happened_wholly_or_not_at_all(
    writes: int, registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, name = MlflowClient(registry), f"{tmp_path.name}-{writes}"
    run_id = model_of(client, name, 2)
    champion_moves(client, name, run_id, "1")
    mortal: Any = Mortal(client, writes)
    try:
        champion_moves(mortal, name, run_id, "2")
        ended = True
    except ConnectionError:
        ended = False
    assert ended == (writes >= 6)  # queue and ticket, then four writes; giving the ticket back may fail
    listed = list_champions(settings_of(registry, name, list=True))
    moved = listed["champion"] == "2"
    assert moved == (writes >= 4)
    assert listed["champion_before"] == ("1" if moved else None)
    assert listed["code"] == "promoted"
    assert bool(listed["warnings"]) == (writes in (3, 4))  # announced and not done, or done and not in the log
    with turn(client, name, run_id, stale_s=0.0) as mine:
        settled = reconcile(mine, name, AT)
    again = read_log(client, name)
    assert again == settled
    assert again.flaws() == []
    assert [entry.version for entry in again.entries] == (["1", "2"] if moved else ["1"])
    assert ("taking over" in capsys.readouterr().err) == (2 <= writes <= 6)
    assert not tickets(client, f"{name}.lock")


def test_waiting_is_told_and_ends_with_who_has_the_turn(
    registry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_module, "POLL_S", 0.02)
    client, name = MlflowClient(registry), tmp_path.name
    run_id = model_of(client, name, 1)
    with turn(client, name, run_id) as first:
        second = turn(MlflowClient(registry), name, run_id, wait_s=0.2)
        with pytest.raises(RegistryError, match=r"process \d+ on .* is promoting to the same model; waited 0 s"):
            second.__enter__()
        assert "waiting: process" in capsys.readouterr().err
        first.require()
        with turn(MlflowClient(registry), name, run_id, stale_s=0.2):
            assert "taking over" in capsys.readouterr().err
            with pytest.raises(RegistryError, match="lost its turn"):
                move(first, name, ChampionLog(None), "1", code="first", reason="", at=AT)
    log = read_log(client, name)
    assert log == ChampionLog(None)


def add_in_turns(uri: str, name: str, run_id: str, times: int) -> None:
    """Adds to a number that loses additions unless reading and writing it are undisturbed."""
    turn_module.POLL_S = 0.02
    client = MlflowClient(uri)
    for _ in range(times):
        with turn(client, name, run_id) as mine:
            number = int(client.get_registered_model(name).tags.get("number", 0))
            mine.require()
            client.set_registered_model_tag(name, "number", str(number + 1))


def test_two_processes_on_one_database_take_turns(registry: str, tmp_path: Path) -> None:
    client, name = MlflowClient(registry), tmp_path.name
    run_id = model_of(client, name, 1)
    other = multiprocessing.get_context("spawn").Process(target=add_in_turns, args=(registry, name, run_id, 6))
    other.start()
    add_in_turns(registry, name, run_id, 3)
    while other.is_alive() and not tickets(client, f"{name}.lock"):
        time.sleep(0.02)  # it has been imported and takes its first turn
    add_in_turns(registry, name, run_id, 3)
    other.join(400)
    assert other.exitcode == 0
    assert client.get_registered_model(name).tags["number"] == "12"
    assert not tickets(client, f"{name}.lock")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server.uri
    server.kill()


def test_two_clients_of_a_real_server_take_turns_and_roll_back(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    client, name = MlflowClient(server), tmp_path.name
    run_id = model_of(client, name, 2)
    failed: list[BaseException] = []

    def add() -> None:
        try:
            add_in_turns(server, name, run_id, 4)
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=add) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(400)
    assert not failed
    assert client.get_registered_model(name).tags["number"] == "8"
    champion_moves(client, name, run_id, "1", "2")
    assert roll_back(settings_of(server, name, rollback=True))["champion"] == "1"
    assert client.get_model_version_by_alias(name, "champion").version == "1"
    assert list_champions(settings_of(server, name, list=True))["warnings"] == []
