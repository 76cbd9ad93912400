"""Past champions of a registered model, read from tags of its versions. Pure: no request is made here.

    previous_champion   the version that had the alias before ("": none), written with the version
    promoted_at         time at which the alias moved to the version, written after it moved
    rolled_back_at/_to  time at which the alias moved back from the version, and where to

The alias itself decides which version is served; where the tags disagree with it, `registry_warnings` says so.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlflow.entities.model_registry import ModelVersion

EARNED = ("first", "promoted", "forced")
"""Verdicts that move the alias."""


@dataclass(frozen=True, slots=True)
class AliasMove:
    """One recorded move of the alias. A version that was promoted twice has only its last promotion."""

    version: str
    """Champion from here on."""
    before: str | None
    """Champion until then; None: there was none."""
    at: str
    """ISO time."""
    code: str
    """Code of a `Verdict`, or `rollback`."""
    reason: str
    """One sentence."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with `before` as `from`."""
        values = asdict(self)
        return {"from": values.pop("before"), **values}


def alias_moves(versions: Sequence[ModelVersion]) -> list[AliasMove]:
    """Recorded moves, oldest first."""
    moves = []
    for version in versions:
        number, tags = str(version.version), version.tags
        if "promoted_at" in tags:
            before = tags.get("previous_champion") or None
            moves.append(
                AliasMove(number, before, tags["promoted_at"], tags.get("verdict_code", ""), tags.get("reason", ""))
            )
        if "rolled_back_at" in tags:
            target = tags.get("rolled_back_to", "")
            reason = f"back to version {target} from version {number}"
            moves.append(AliasMove(target, number, tags["rolled_back_at"], "rollback", reason))
    return sorted(moves, key=lambda move: move.at)


def predecessor(champion: str | None, versions: Sequence[ModelVersion]) -> str | None:
    """The version to roll back to: the champion's `previous_champion`.

    Where that is deleted, rolled back itself or not recorded, the newest promotion before the champion's that was not
    rolled back. None: the champion was the first, or nothing is recorded.
    """
    tags = {str(version.version): version.tags for version in versions}
    own = tags.get(champion or "", {})
    recorded = own.get("previous_champion")
    if recorded == "":
        return None
    if recorded in tags and not _rolled_back(tags[recorded]):
        return recorded
    standing = {
        number: of_version["promoted_at"]
        for number, of_version in tags.items()
        if number != champion and "promoted_at" in of_version and not _rolled_back(of_version)
    }
    limit = own.get("promoted_at")
    earlier = [number for number, at in standing.items() if limit is None or at < limit]
    return max(earlier, key=standing.__getitem__, default=None)


def registry_warnings(champion: str | None, versions: Sequence[ModelVersion]) -> list[str]:
    """Sentences about versions whose promotion was interrupted, and about an alias that was moved by other means."""
    warnings = []
    moves = alias_moves(versions)
    last = moves[-1].version if moves else None
    tags = {str(version.version): version.tags for version in versions}
    if champion is not None and champion in tags and _interrupted(tags[champion]):
        warnings.append(
            f"version {champion} has the alias, but its promotion was interrupted before that was recorded; promote "
            "it again to record it"
        )
    elif champion != last:
        alias = f"the alias is at version {champion}" if champion else "no version has the alias"
        recorded = f"the last recorded move was to version {last}" if last else "no move is recorded"
        warnings.append(f"{alias}, but {recorded}: it was moved by other means, or a rollback was interrupted")
    had_alias = {champion, *(of_version.get("previous_champion") for of_version in tags.values())}
    return warnings + [
        f"version {number} earned the alias and never had it: its promotion was interrupted; promote it again"
        for number, of_version in tags.items()
        if number not in had_alias and _interrupted(of_version)
    ]


def _interrupted(tags: dict[str, str]) -> bool:
    """True if a version earned the alias and no move to it is recorded."""
    return tags.get("verdict_code") in EARNED and "promoted_at" not in tags


def _rolled_back(tags: dict[str, str]) -> bool:
    """True if the version was rolled back after its last promotion."""
    return tags.get("rolled_back_at", "") > tags.get("promoted_at", "")
