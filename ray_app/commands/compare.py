"""`ray-app compare`: checkpoints on the same test pairs, or the drafters of several runs of `decode`."""

from typing import Any

from rich.console import Console

from ray_app.commands.decode.compare import compare_drafters, render_drafters
from ray_app.commands.evaluate.compare import compare_checkpoints, render_checkpoints
from ray_app.config.evaluate import CompareConfig
from ray_app.reports.folder import are_decoded


def run_compare(cfg: CompareConfig) -> dict[str, Any]:
    """Compare what is named; return the --json object. Errors: as of either."""
    return compare_drafters(cfg) if are_decoded(cfg.checkpoints) else compare_checkpoints(cfg)


def render_compare(result: dict[str, Any], console: Console) -> None:
    """Print the table, the verdict and the files."""
    (render_drafters if "drafters" in result else render_checkpoints)(result, console)
