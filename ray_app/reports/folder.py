"""Folders of reports: what a command writes there may be replaced, anything else is in the way."""

from collections.abc import Sequence
from pathlib import Path

from ray_app.errors import ConfigError, StoreError
from ray_app.listing import data_in

REPORT_FILES = ("alignment_metrics_*.json", "benchmark_adapter_full_*.json", "report.html", ".*")
"""Files of `evaluate` and `benchmark`."""
COMPARISON_FILES = ("comparison.json", "comparison.html", ".*")
"""Files of `compare`."""
DECODE_SETTINGS = "decode.json"
"""File with the settings of a run of `decode`, which is known by it."""


def claim_report_folder(folder: Path, files: tuple[str, ...] = REPORT_FILES) -> None:
    """StoreError unless `folder` is new or holds only `files`: what evaluate and benchmark write."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; --out names the folder for the report.")
    if folder.is_dir():
        for path in data_in(folder):
            if not any(path.match(pattern) for pattern in files):
                raise StoreError(
                    f"{folder} already holds another file ({path.name}); nothing is deleted or mixed in. "
                    f"Name another folder, for instance --out {folder.with_name(folder.name + '-report')}."
                )


def are_decoded(names: Sequence[str]) -> bool:
    """Return True if all are runs of `decode`, False if none is. ConfigError: some are."""
    decoded = [(Path(name) / DECODE_SETTINGS).is_file() for name in names]
    if any(decoded) and not all(decoded):
        raise ConfigError(
            f"compare takes checkpoints, or runs of `decode`: {names[decoded.index(True)]} is such a run, "
            f"{names[decoded.index(False)]} is not."
        )
    return all(decoded)
