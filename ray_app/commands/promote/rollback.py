"""`ray-app promote --list` and `--rollback`: show present and past champions; move the alias back by one."""

from datetime import UTC, datetime
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from rich.console import Console
from rich.table import Table

from ray_app.commands.promote.champions import alias_moves, predecessor, registry_warnings
from ray_app.config.tune import TOKENS
from ray_app.core.thresholds import THETA, rate_key
from ray_app.errors import RegistryError
from ray_app.tracking.model_registry import CHAMPION, ModelRegistry

RATE_TAG = f"cosine_accept_rate_{rate_key(THETA)}"
"""Tag of a version: its acceptance on the test part."""


def list_champions(registry: ModelRegistry) -> dict[str, Any]:
    """Versions with their metrics, the champion, and its recorded moves. Changes nothing.

    RegistryError: there is no such model, or the server is away.
    """
    champion, versions = read_versions(registry)
    moves = alias_moves(versions)
    last = moves[-1] if moves and moves[-1].version == champion else None
    return {
        "action": "list",
        "model": registry.model,
        "tracking_uri": registry.address,
        "champion": champion,
        "since": last.at if last else None,
        "code": last.code if last else None,
        "reason": last.reason if last else None,
        "champion_before": predecessor(champion, versions),
        "versions": [version_row(version, champion) for version in versions],
        "history": [move.to_dict() for move in moves],
        "warnings": registry_warnings(champion, versions),
    }


def roll_back(registry: ModelRegistry) -> dict[str, Any]:
    """Move the alias back to the champion before this one. RegistryError: none is recorded."""
    champion, versions = read_versions(registry)
    target = predecessor(champion, versions)
    if target is None:
        present = f"version {champion}" if champion else "no version"
        raise RegistryError(
            f"{registry.model}: {CHAMPION} is {present}, and no champion before it is recorded; "
            "`ray-app promote --list` shows the record."
        )
    tags = next(version.tags for version in versions if str(version.version) == target)
    since = f", promoted {tags['promoted_at']} ({tags.get('verdict_code')})" if "promoted_at" in tags else ""
    at = timestamp()
    if registry.champion() != champion:
        raise RegistryError(
            f"{registry.model}: the champion changed in the meantime; look at it, then roll back again"
        )
    registry.move_alias(target)
    if champion is not None:
        registry.tag_version(champion, "rolled_back_to", target)
        registry.tag_version(champion, "rolled_back_at", at)
    return {
        "action": "rollback",
        "model": registry.model,
        "tracking_uri": registry.address,
        "champion": target,
        "champion_before": champion,
        "reason": f"back to version {target}{since}",
        "at": at,
    }


def read_versions(registry: ModelRegistry) -> tuple[str | None, list[ModelVersion]]:
    """The champion's number and all versions. RegistryError: there is none."""
    versions, champion = registry.versions(), registry.champion()
    if not versions:
        raise RegistryError(
            f"there is no model '{registry.model}' with a version at {registry.address}; "
            "`ray-app promote RUN` registers its first version, --model-name and --tracking-uri choose another."
        )
    return champion, versions


def timestamp() -> str:
    """Now, as an ISO time in UTC with milliseconds: such texts sort by time."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def version_row(version: ModelVersion, champion: str | None) -> dict[str, Any]:
    """One row of the list, from the version's tags; None for each one it lacks."""
    tags = version.tags
    return {
        "version": str(version.version),
        "champion": str(version.version) == champion,
        "registered_at": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        RATE_TAG: float(tags[RATE_TAG]) if RATE_TAG in tags else None,
        "lift": float(tags["lift"]) if "lift" in tags else None,
        TOKENS: float(tags[TOKENS]) if TOKENS in tags else None,
        **{key: tags.get(key) for key in ("best_baseline", "pairs", "source", "verdict_code", "reason")},
    }


def render_rollback(result: dict[str, Any], console: Console) -> None:
    """Print which version is champion again."""
    name = f"{result['model']} version {result['champion']}"
    before = f"version {result['champion_before']}" if result["champion_before"] else "no version"
    console.print(f"{CHAMPION}: {name}, instead of {before}; {result['reason']}", style="bold green")


def render_list(result: dict[str, Any], console: Console) -> None:
    """Print a table of the versions, the champion, its recorded moves, and the warnings."""
    table = Table(box=None, title=f"{result['model']} ({result['tracking_uri']})")
    drafting = any(row[TOKENS] is not None for row in result["versions"])
    numbers = ((TOKENS, ".3f"),) if drafting else ((RATE_TAG, ".4f"), ("lift", "+.4f"))
    heads = ("tokens per target pass",) if drafting else ("accept 0.80", "lift")
    for heading in ("version", *heads, "best baseline", "pairs", "data", "verdict"):
        table.add_column(heading)
    for row in result["versions"]:
        values = [f"{row[key]:{form}}" if row[key] is not None else "" for key, form in numbers]
        mark = f"→ {row['version']}" if row["champion"] else f"  {row['version']}"
        cells = [row[key] or "" for key in ("best_baseline", "pairs", "source", "verdict_code")]
        table.add_row(mark, *values, *cells, style="bold green" if row["champion"] else None)
    console.print(table)
    if result["champion"] is None:
        console.print(f"{CHAMPION}: no version")
    else:
        since = f" since {result['since']}; {result['reason']}" if result["since"] else ""
        console.print(f"{CHAMPION}: version {result['champion']}{since}", style="bold")
    if result["champion_before"]:
        console.print(f"before: version {result['champion_before']}; --rollback moves the alias back")
    for move in reversed(result["history"]):
        console.print(
            f"  {move['at']}  {move['from'] or 'none'} → {move['version']}  {move['code']}: {move['reason']}",
        )
    for warning in result["warnings"]:
        console.print(f"- {warning}", style="yellow")
