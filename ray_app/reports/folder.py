"""Folders of reports: what a command writes there may be replaced, anything else is in the way."""

from pathlib import Path

from ray_app.errors import StoreError
from ray_app.listing import data_in

REPORT_FILES = ("alignment_metrics_*.json", "benchmark_adapter_full_*.json", "report.html", ".*")
"""Files of `evaluate` and `benchmark`."""
COMPARISON_FILES = ("comparison.json", "comparison.html", ".*")
"""Files of `compare`."""


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
