"""`ray-app promote --list` and `--rollback`: who is champion, who was, and going back one."""

from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from rich.console import Console
from rich.table import Table

from ray_app.commands.promote.champion_history import CHAMPION, ChampionLog, move, predecessor, read_log, reconcile
from ray_app.commands.promote.registry_lock import turn
from ray_app.config.evaluate import PromoteConfig
from ray_app.core.metrics import THETA, rate_key
from ray_app.errors import RegistryError
from ray_app.tracking.mlflow_logger import redact_password, tracking_uri
from ray_app.tracking.model_registry import registered_versions, registry_errors

RATE = f"cosine_accept_rate_{rate_key(THETA)}"
"""Tag of a version."""


def list_champions(cfg: PromoteConfig) -> dict[str, Any]:
    """The versions with their metrics, who is champion, who was, when and why. Changes nothing.

    RegistryError: there is no such model, or the server is away.
    """
    with registry_errors(cfg):
        client = MlflowClient(tracking_uri(cfg))
        log, versions = existing(cfg, client)
    settled = log.settled("")  # with a move in it that was cut short after the alias moved
    last = settled.last if settled.last and settled.last.code != "found" else log.last
    if last and last.version != log.champion:
        last = None
    before = predecessor(settled.entries, [str(version.version) for version in versions])
    return {
        "action": "list",
        "model": cfg.model_name,
        "tracking_uri": redact_password(tracking_uri(cfg)),
        "champion": log.champion,
        "since": last.at if last else None,
        "code": last.code if last else None,
        "reason": last.reason if last else None,
        "champion_before": before.version if before else None,
        "versions": [about(version, log.champion) for version in versions],
        "history": [entry.to_dict() for entry in log.entries],
        "warnings": [*log.flaws(), *interrupted_promotions(versions, settled)],
    }


def roll_back(cfg: PromoteConfig) -> dict[str, Any]:
    """The alias goes back to who was champion before. RegistryError where nobody was."""
    with registry_errors(cfg):
        client = MlflowClient(tracking_uri(cfg))
        _, versions = existing(cfg, client)
        if not versions:
            raise RegistryError(f"{cfg.model_name} has no versions; there is nobody to go back to.")
        with turn(client, cfg.model_name, str(versions[-1].run_id)) as mine:
            at = datetime.now(UTC).isoformat(timespec="seconds")
            log = reconcile(mine, cfg.model_name, at)
            target = predecessor(
                log.entries, [str(version.version) for version in registered_versions(client, cfg.model_name)]
            )
            if target is None or target.version is None:
                present = f"version {log.champion}" if log.champion else "nobody"
                raise RegistryError(
                    f"{cfg.model_name}: {CHAMPION} is {present}, and the log knows of nobody before; "
                    "`ray-app promote --list` shows it."
                )
            reason = f"back to version {target.version}, champion since {target.at} ({target.code})"
            move(mine, cfg.model_name, log, target.version, code="rollback", reason=reason, at=at)
    return {
        "action": "rollback",
        "model": cfg.model_name,
        "tracking_uri": redact_password(tracking_uri(cfg)),
        "champion": target.version,
        "champion_before": log.champion,
        "reason": reason,
        "at": at,
    }


def render_rollback(result: dict[str, Any], console: Console) -> None:
    """Who is champion again."""
    name = f"{result['model']} version {result['champion']}"
    before = f"version {result['champion_before']}" if result["champion_before"] else "nobody"
    console.print(f"{CHAMPION}: {name}, instead of {before}; {result['reason']}", style="bold green", markup=False)


def render_list(result: dict[str, Any], console: Console) -> None:
    """A table of the versions, the champion, the log, and what does not agree."""
    table = Table(box=None, title=f"{result['model']} ({result['tracking_uri']})")
    for heading in ("version", "accept 0.80", "lift", "best baseline", "pairs", "data", "verdict"):
        table.add_column(heading)
    for row in result["versions"]:
        rate, lift = (
            f"{row[key]:{form}}" if row[key] is not None else "" for key, form in ((RATE, ".4f"), ("lift", "+.4f"))
        )
        mark = f"→ {row['version']}" if row["champion"] else f"  {row['version']}"
        cells = [row[key] or "" for key in ("best_baseline", "pairs", "source", "verdict_code")]
        table.add_row(mark, rate, lift, *cells, style="bold green" if row["champion"] else None)
    console.print(table)
    if result["champion"] is None:
        console.print(f"{CHAMPION}: nobody", markup=False)
    else:
        since = f" since {result['since']}; {result['reason']}" if result["since"] else ""
        console.print(f"{CHAMPION}: version {result['champion']}{since}", style="bold", markup=False)
    if result["champion_before"]:
        console.print(f"before: version {result['champion_before']}; --rollback goes back to it", markup=False)
    for entry in reversed(result["history"]):
        whence, whither = (entry[key] or "nobody" for key in ("from", "version"))
        console.print(f"  {entry['at']}  {whence} → {whither}  {entry['code']}: {entry['reason']}", markup=False)
    for note in result["warnings"]:
        console.print(f"- {note}", style="yellow", markup=False)


def existing(cfg: PromoteConfig, client: MlflowClient) -> tuple[ChampionLog, list[ModelVersion]]:
    """The log and the versions of a model. RegistryError where there is none."""
    log = read_log(client, cfg.model_name)
    if log is None:
        raise RegistryError(
            f"there is no model '{cfg.model_name}' at {redact_password(tracking_uri(cfg))}; "
            "`ray-app promote RUN` registers its first version, --model-name and --tracking-uri choose another."
        )
    return log, registered_versions(client, cfg.model_name)


def interrupted_promotions(versions: list[ModelVersion], log: ChampionLog) -> list[str]:
    """Versions that earned the alias in a promotion that was killed before it moved."""
    moved = {entry.version for entry in log.entries}
    return [
        f"version {version.version} earned the alias and never had it: its promotion was cut short; promote it again"
        for version in versions
        if version.tags.get("verdict_code") in ("first", "promoted", "forced") and str(version.version) not in moved
    ]


def about(version: ModelVersion, champion: str | None) -> dict[str, Any]:
    """One row of the list, from what the version tells of itself; None where it tells nothing."""
    tags = version.tags
    return {
        "version": str(version.version),
        "champion": str(version.version) == champion,
        "registered_at": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        RATE: float(tags[RATE]) if RATE in tags else None,
        "lift": float(tags["lift"]) if "lift" in tags else None,
        **{key: tags.get(key) for key in ("best_baseline", "pairs", "source", "verdict_code", "reason")},
    }
