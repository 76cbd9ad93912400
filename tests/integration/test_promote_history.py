"""The record of champions says what happened whatever was interrupted; rollback and --list follow it."""

import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_process import MlflowServer

from ray_app.commands.promote import promotion
from ray_app.commands.promote.champions import alias_moves, predecessor, registry_warnings
from ray_app.commands.promote.promotion import Challenger, alignment_tags, register
from ray_app.commands.promote.rollback import list_champions, roll_back
from ray_app.config.evaluate import PromoteConfig
from ray_app.core.promotion_policy import promotion_verdict
from ray_app.errors import ConfigError, RegistryError
from ray_app.tracking.model_registry import ModelRegistry

RATES = ("0.50", "0.60", "0.70", "0.80", "0.85", "0.90", "0.95")


def versions_after(*moves: tuple[str, str], deleted: tuple[str, ...] = ()) -> tuple[str | None, list[Any]]:
    """Champion and versions after some moves (`promote` or `rollback` or `by hand`, version)."""
    tags: dict[str, dict[str, str]] = {}
    champion: str | None = None
    for hour, (what, number) in enumerate(moves):
        at = f"2027-01-01T{hour:02}:00:00.000+00:00"
        if what == "promote":
            tags[number] = tags.get(number, {}) | {"promoted_at": at, "previous_champion": champion or ""}
            tags[number] |= {"verdict_code": "promoted", "reason": "earned"}
        elif what == "rollback":
            assert champion
            tags[champion] |= {"rolled_back_to": number, "rolled_back_at": at}
        tags.setdefault(number, {})
        champion = number
    return champion, [SimpleNamespace(version=v, tags=t) for v, t in tags.items() if v not in deleted]


P, R, H = "promote", "rollback", "by hand"


@pytest.mark.parametrize(
    ("moves", "deleted", "wanted"),
    [
        ([], (), None),
        ([(P, "1")], (), None),
        ([(P, "1"), (P, "2"), (P, "3")], (), "2"),
        ([(P, "1"), (P, "2"), (P, "3"), (R, "2")], (), "1"),
        # Two rollbacks go two back, not back and forth.
        ([(P, "1"), (P, "2"), (P, "3"), (R, "2"), (R, "1")], (), None),
        ([(P, "1"), (P, "2"), (R, "1"), (P, "3")], (), "1"),
        ([(P, "1"), (P, "2"), (P, "3"), (P, "2"), (R, "3")], (), "1"),
        # A version has one record: that 1 was champion before 2 is lost when 1 is promoted again and rolled back.
        ([(P, "1"), (P, "2"), (P, "1"), (R, "2")], (), None),
        ([(P, "1"), (P, "2"), (R, "1"), (P, "2")], (), "1"),  # promoted again after it was rolled back
        ([(P, "1"), (H, "2"), (P, "3")], (), "2"),
        ([(P, "1"), (P, "2"), (H, "3")], (), "2"),
        ([(P, "1"), (P, "2"), (H, "3")], ("2",), "1"),
        ([(P, "1"), (P, "8"), (P, "3")], ("8",), "1"),
        ([(P, "1"), (P, "8"), (P, "3"), (R, "1")], ("8",), None),
    ],
)
def test_a_rollback_goes_to_the_champion_before(
    moves: list[tuple[str, str]], deleted: tuple[str, ...], wanted: str | None
) -> None:
    champion, versions = versions_after(*moves, deleted=deleted)
    assert predecessor(champion, versions) == wanted
    by_hand = any(what == H for what, _ in moves[-1:])
    assert bool(registry_warnings(champion, versions)) == by_hand


def test_a_rollback_without_a_champion_goes_to_the_last_promotion() -> None:
    _, versions = versions_after((P, "1"), (P, "2"))
    assert predecessor(None, versions) == "2"
    (warning,) = registry_warnings(None, versions)
    assert "no version has the alias, but the last recorded move was to version 2" in warning


def test_moves_are_listed_in_order_with_where_from_and_why() -> None:
    _, versions = versions_after((P, "1"), (P, "2"), (P, "3"), (R, "2"))
    moves = alias_moves(versions)
    assert [(move.before, move.version, move.code) for move in moves] == [
        (None, "1", "promoted"),
        ("1", "2", "promoted"),
        ("2", "3", "promoted"),
        ("3", "2", "rollback"),
    ]
    assert moves[-1].reason == "back to version 2 from version 3"
    assert moves[0].to_dict() == {
        "version": "1", "from": None, "at": "2027-01-01T00:00:00.000+00:00", "code": "promoted", "reason": "earned",
    }  # fmt: skip


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


class Contest:
    """A model whose challengers are made up: each has a name, and an acceptance that decides."""

    def __init__(self, uri: str, name: str) -> None:
        self.registry = ModelRegistry(uri, name, name)
        client = self.registry.client
        self.run_id = client.create_run(client.create_experiment(name)).info.run_id

    def promote(self, name: str, rate: float, against: str | None, registry: ModelRegistry | None = None) -> Any:
        """`register` of the challenger against a champion that accepts as its tag says; None: compare again."""
        registry = registry or self.registry
        key = "cosine_accept_rate_0.80"
        opponent = None
        if against is not None:
            opponent = {"cosine_accept_rate": {"0.80": float(self.registry.tags(against)[key])}}
            opponent["test_fingerprint"] = "f" * 64  # type: ignore[assignment]
        checkpoint: Any = SimpleNamespace(sha256="c" * 64, folder=name)
        metrics = metrics_of(rate)
        challenger = Challenger(checkpoint, f"weights of {name}", self.run_id, metrics, alignment_tags(metrics))
        return register(registry, challenger, against, opponent, partial(promotion_verdict, metrics, opponent))


def metrics_of(rate: float) -> dict[str, Any]:
    rates = dict.fromkeys(RATES, rate)
    baseline = {"cos_sim_mean": 0.5, "cosine_accept_rate": dict.fromkeys(RATES, 0.0)}
    return {
        "cosine_accept_rate": rates, "cos_sim_mean": 0.9, "cos_sim_std": 0.1, "lift": rate, "percentiles": {},
        "interval95": {"lift": [0.0, 1.0]}, "best_baseline": "white", "previous_window_better": False,
        "centered_cos_sim_mean": 0.1, "pairs": 10, "fingerprint": "s" * 64, "test_fingerprint": "f" * 64,
        "split": {"label": "by sequence"}, "data": {"source": "npy", "events": "real"}, "verdict": "It is.",
        "baselines": {"white": baseline},
    }  # fmt: skip


@pytest.fixture
def contest(registry: str, tmp_path: Path) -> Contest:
    return Contest(registry, tmp_path.name)


def test_rollback_goes_back_again_and_again_and_the_list_says_who_when_and_why(contest: Contest) -> None:
    for number, against in enumerate((None, "1", "2"), 1):
        assert contest.promote(f"run {number}", number / 10, against)["champion"] == str(number)
    assert roll_back(contest.registry)["champion"] == "2"
    result = roll_back(contest.registry)
    assert (result["champion"], result["champion_before"]) == ("1", "2")
    listed = list_champions(contest.registry)
    json.dumps(listed, allow_nan=False)
    assert (listed["champion"], listed["champion_before"], listed["code"]) == ("1", None, "rollback")
    assert "back to version 1" in listed["reason"]
    assert listed["since"] == result["at"]
    moves = [(None, "1"), ("1", "2"), ("2", "3"), ("3", "2"), ("2", "1")]
    assert [(move["from"], move["version"]) for move in listed["history"]] == moves
    assert not listed["warnings"]
    with pytest.raises(RegistryError, match="champion is version 1, and no champion before it is recorded"):
        roll_back(contest.registry)


def test_an_alias_moved_by_hand_is_reported_and_a_rollback_starts_there(contest: Contest) -> None:
    contest.promote("first", 0.1, None)
    contest.promote("second", 0.2, "1")
    assert contest.promote("third", 0.1, "2")["verdict_code"] == "no_gain"
    contest.registry.move_alias("3")
    listed = list_champions(contest.registry)
    assert (listed["champion"], listed["champion_before"], listed["since"]) == ("3", "2", None)
    assert "moved by other means" in listed["warnings"][0]
    contest.registry.client.delete_model_version(contest.registry.model, "2")
    result = roll_back(contest.registry)
    assert (result["champion"], result["champion_before"]) == ("1", "3")  # 2 is deleted
    listed = list_champions(contest.registry)
    assert [move["code"] for move in listed["history"]] == ["first", "rollback"]
    assert not listed["warnings"]


def test_a_model_that_is_not_there_is_named(registry: str) -> None:
    for action in (list_champions, roll_back):
        with pytest.raises(RegistryError, match=r"no model 'nowhere'.*promote RUN"):
            action(ModelRegistry(registry, "nowhere", "nowhere"))


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


def killed_after(contest: Contest, writes: int) -> ModelRegistry:
    """The contest's registry in a process that is killed before its next write but so many."""
    mortal = ModelRegistry(contest.registry.uri, contest.registry.model, contest.registry.experiment)
    mortal.__dict__["client"] = Mortal(contest.registry.client, writes)
    return mortal


@pytest.mark.parametrize("writes", range(4))
def test_a_promotion_killed_before_any_of_its_writes_is_listed_as_it_is_and_completed_by_the_next(
    writes: int, contest: Contest
) -> None:
    contest.promote("first", 0.1, None)
    with pytest.raises(RegistryError, match="killed"):  # writes: model, version, alias, promoted_at
        contest.promote("second", 0.2, "1", killed_after(contest, writes))
    listed = list_champions(contest.registry)
    moved = writes >= 3
    assert listed["champion"] == contest.registry.champion() == ("2" if moved else "1")
    assert listed["champion_before"] == ("1" if moved else None)
    expected = {2: "version 2 earned the alias and never had it", 3: "version 2 has the alias, but its promotion"}
    assert [warning.startswith(expected.get(writes, "none")) for warning in listed["warnings"]] == [True] * (
        writes >= 2
    )
    again = contest.promote("second", 0.2, listed["champion"])
    assert (again["champion"], again["version"], again["warnings"]) == ("2", "2", [])
    listed = list_champions(contest.registry)
    assert (listed["champion"], listed["champion_before"], listed["warnings"]) == ("2", "1", [])
    assert listed["code"] == "promoted"
    assert roll_back(contest.registry)["champion"] == "1"


@pytest.mark.parametrize("writes", range(3))
def test_a_rollback_killed_before_any_of_its_writes_is_listed_as_it_is(writes: int, contest: Contest) -> None:
    contest.promote("first", 0.1, None)
    contest.promote("second", 0.2, "1")
    with pytest.raises(RegistryError, match="killed"):  # writes: alias, where to, when
        roll_back(killed_after(contest, writes))
    listed = list_champions(contest.registry)
    assert listed["champion"] == ("2" if writes == 0 else "1")
    assert [("rollback was interrupted" in warning) for warning in listed["warnings"]] == [True] * (writes > 0)


@pytest.mark.parametrize("writes", range(12))
def test_a_version_that_was_rolled_back_is_promoted_again_whatever_is_interrupted(
    writes: int, contest: Contest
) -> None:
    contest.promote("first", 0.1, None)
    contest.promote("second", 0.2, "1")
    roll_back(contest.registry)
    with contextlib.suppress(RegistryError):
        contest.promote("second", 0.2, "1", killed_after(contest, writes))
    again = contest.promote("second", 0.2, contest.registry.champion())
    assert (again["champion"], again["warnings"]) == ("2", [])
    assert roll_back(contest.registry)["champion"] == "1"


def test_a_rollback_that_a_promotion_overtakes_moves_nothing(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    contest.promote("first", 0.1, None)
    contest.promote("second", 0.2, "1")
    champions = iter(["2", "3"])
    monkeypatch.setattr(ModelRegistry, "champion", lambda _: next(champions))
    with pytest.raises(RegistryError, match="the champion changed in the meantime"):
        roll_back(contest.registry)
    monkeypatch.undo()
    assert contest.registry.champion() == "2"


def test_a_version_that_was_interrupted_shows_in_the_next_promotion(contest: Contest) -> None:
    contest.promote("first", 0.1, None)
    with pytest.raises(RegistryError, match="killed"):
        contest.promote("second", 0.2, "1", killed_after(contest, 2))
    result = contest.promote("third", 0.3, "1")
    (warning,) = result["warnings"]
    assert "version 2 earned the alias and never had it" in warning
    lost = contest.promote("second", 0.2, "3")  # compared again, and not better than the champion of today
    assert (lost["verdict_code"], lost["warnings"]) == ("no_gain", [])


def test_of_two_promotions_at_once_the_later_one_sees_that_the_champion_changed(contest: Contest) -> None:
    contest.promote("first", 0.1, None)
    assert contest.promote("second", 0.2, "1")["champion"] == "2"
    late = contest.promote("third", 0.15, "1")  # compared with version 1 before version 2 was promoted
    assert late is None
    assert contest.registry.champion() == "2"
    again = contest.promote("third", 0.15, "2")
    assert (again["verdict_code"], again["champion"]) == ("no_gain", "2")
    assert (again["version"], again["new_version"], again["warnings"]) == ("3", False, [])


def test_a_promoted_version_keeps_the_reason_of_its_promotion(
    contest: Contest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promotion, "timestamp", lambda: "2027-01-01T00:00:00.000+00:00")
    contest.promote("first", 0.1, None)
    contest.promote("second", 0.2, "1")
    assert contest.promote("second", 0.2, "2")["verdict_code"] == "already_champion"
    assert contest.promote("first", 0.1, "2")["verdict_code"] == "no_gain"
    codes = [version.tags["verdict_code"] for version in contest.registry.versions()]
    assert codes == ["first", "promoted"]


def test_a_real_server_promotes_and_rolls_back(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        contest = Contest(server.uri, tmp_path.name)
        contest.promote("first", 0.1, None)
        contest.promote("second", 0.2, "1")
        assert contest.promote("third", 0.15, "1") is None
        assert roll_back(contest.registry)["champion"] == contest.registry.champion() == "1"
        # The third was interrupted, so to say: it was not compared again.
        (warning,) = list_champions(contest.registry)["warnings"]
        assert warning.startswith("version 3 earned the alias and never had it")
    finally:
        server.kill()
