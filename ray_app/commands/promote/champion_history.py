"""Who was champion, when and why: a log that only grows, kept as tags of the registered model.

The alias is the truth of who serves. A move of it is written in four steps, by the one process that has its turn:

    1. tag `champion.moving`: what is about to happen      killed after it: the alias has not moved, so it never
    2. the alias                                             happened, and the next move forgets it
    3. tag `champion.NNNN`: it has happened                killed between 2 and 4: the alias has moved, and the
    4. `champion.moving` goes                                next move completes the log

An alias that somebody moved by other means is told, and becomes an entry of its own at the next move.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_app.commands.promote.registry_lock import RegistryLock
from ray_app.errors import RegistryError

CHAMPION = "champion"
"""The alias that the endpoint serves."""
MOVING = "champion.moving"
ENTRY = re.compile(r"champion\.(\d{4,})")
REASON = 2_000
"""Characters of a reason in the log; a tag has room for 5,000."""


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One move of the alias."""

    number: int
    """From 1, without gaps."""
    version: str | None
    """Champion from here on; None: nobody."""
    before: str | None
    """Champion until then."""
    at: str
    """ISO time."""
    code: str
    """A code of `Verdict`, or `rollback`, or `found` for an alias that was moved by other means."""
    reason: str
    """One sentence."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with `before` as `from`."""
        return {
            "number": self.number,
            "version": self.version,
            "from": self.before,
            "at": self.at,
            "code": self.code,
            "reason": self.reason,
        }

    def to_tag(self) -> str:
        """As a tag's text."""
        return json.dumps({**self.to_dict(), "reason": self.reason[:REASON]})

    @classmethod
    def from_tag(cls, key: str, text: str) -> "AliasMove":
        """The inverse of `to_tag`. RegistryError names the tag that is not one."""
        try:
            found = json.loads(text)
            return cls(
                number=int(found["number"]),
                version=found["version"],
                before=found["from"],
                at=found["at"],
                code=found["code"],
                reason=found["reason"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"the tag {key} of the registered model is no entry of the log of champions ({error}); mend it, or "
                "delete it to go on without it"
            ) from error


@dataclass(frozen=True, slots=True)
class ChampionLog:
    """The alias and the tags, read in one request."""

    champion: str | None
    """The version that bears the alias."""
    entries: tuple[AliasMove, ...] = ()
    """Oldest first."""
    moving: AliasMove | None = None
    """A move that has not been ended, if there is one."""

    @classmethod
    def of(cls, aliases: Mapping[str, Any], tags: Mapping[str, str]) -> "ChampionLog":
        """From what a registered model bears."""
        champion = aliases.get(CHAMPION)
        entries = [AliasMove.from_tag(key, text) for key, text in tags.items() if ENTRY.fullmatch(key)]
        return cls(
            champion=None if champion is None else str(champion),  # MLflow gives now a number, now a text
            entries=tuple(sorted(entries, key=lambda entry: entry.number)),
            moving=AliasMove.from_tag(MOVING, tags[MOVING]) if MOVING in tags else None,
        )

    @property
    def last(self) -> AliasMove | None:
        """The newest entry."""
        return self.entries[-1] if self.entries else None

    def settled(self, at: str) -> "ChampionLog":
        """The log as it should be, the alias being as it is: a move that was cut short is in it or forgotten."""
        entries = list(self.entries)
        number = entries[-1].number if entries else 0
        if self.moving and self.moving.number > number and self.moving.version == self.champion:
            entries.append(self.moving)
        last = entries[-1] if entries else None
        if (last.version if last else None) != self.champion:
            reason = "the alias was moved by other means; found at the next move"
            before = last.version if last else None
            entries.append(AliasMove(last.number + 1 if last else 1, self.champion, before, at, "found", reason))
        return ChampionLog(self.champion, tuple(entries))

    def flaws(self) -> list[str]:
        """What a reader of the log must know: it may disagree with the alias, which is the truth."""
        told = []
        last, moving = self.last, self.moving
        if moving and (last is None or moving.number > last.number):
            whom = f"the move to version {moving.version}, begun {moving.at}, was cut short"
            if moving.version == self.champion:
                return [f"{whom} after the alias had moved; the next move completes the log"]
            told.append(f"{whom} before the alias moved, so it did not happen; the next move forgets it")
        if (last.version if last else None) != self.champion:
            logged = f"the log's last champion is version {last.version}" if last else "the log is empty"
            there = f"is at version {self.champion}" if self.champion else "is nowhere"
            told.append(f"the alias {there}, but {logged}: it was moved by other means")
        return told


def champion_stack(entries: Sequence[AliasMove]) -> list[AliasMove]:
    """The stack of champions, the present one last, each as the entry that made it champion.

    A rollback takes the top off, and what else lies above the version it went back to.
    """
    stack: list[AliasMove] = []
    for entry in entries:
        if entry.code != "rollback":
            stack.append(entry)
            continue
        del stack[-1:]
        while stack and stack[-1].version != entry.version:
            del stack[-1]
        if not stack:  # the log lost what lay here
            stack.append(entry)
    return stack


def predecessor(entries: Sequence[AliasMove], versions: Collection[str]) -> AliasMove | None:
    """Who was champion before the present one: the nearest below in the stack that is another and still exists."""
    stack = champion_stack(entries)
    present = stack[-1].version if stack else None
    return next((e for e in reversed(stack[:-1]) if e.version in versions and e.version != present), None)


def read_log(client: MlflowClient, model: str) -> ChampionLog | None:
    """The model's log as it stands, or None where there is no such model."""
    try:
        found = client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return ChampionLog.of(found.aliases, found.tags)


def reconcile(turn: RegistryLock, model: str, at: str) -> ChampionLog:
    """Makes the log agree with the alias, and returns it."""
    log = read_log(turn.client, model) or ChampionLog(None)
    settled = log.settled(at)
    for entry in settled.entries[len(log.entries) :]:
        turn.client.set_registered_model_tag(model, key_of(entry), entry.to_tag())
    if log.moving:
        turn.client.delete_registered_model_tag(model, MOVING)
    return settled


def move(
    turn: RegistryLock, model: str, log: ChampionLog, version: str, *, code: str, reason: str, at: str
) -> AliasMove:
    """Moves the alias, on record. `log` is what `settle` returned in this turn."""
    entry = AliasMove(log.last.number + 1 if log.last else 1, version, log.champion, at, code, reason)
    turn.require()
    turn.client.set_registered_model_tag(model, MOVING, entry.to_tag())
    turn.client.set_registered_model_alias(model, CHAMPION, version)
    turn.client.set_registered_model_tag(model, key_of(entry), entry.to_tag())
    turn.client.delete_registered_model_tag(model, MOVING)
    return entry


def key_of(entry: AliasMove) -> str:
    """The tag of an entry, such as `champion.0001`."""
    return f"champion.{entry.number:04d}"
