"""A pair store as a source: its pictures, to be encoded. One task for each of its files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_app.errors import InputError
from ray_app.sources.base import RawPair, SourceTask
from ray_app.store.filesystem import StorageDir
from ray_app.store.manifest import Manifest, PartRecord
from ray_app.store.pair_store import FACT_COLUMNS, feature_matrix, read_part


@dataclass(frozen=True)
class StoreSource:
    """Pairs of a store of pictures, in the order of its files."""

    folder: StorageDir
    """Folder of the store."""
    manifest: Manifest
    """Its manifest."""

    name = "encode"

    def describe(self) -> dict[str, Any]:
        """Return the source of the store, and the store."""
        return {**self.manifest.source, "encoded_from": self.manifest.fingerprint}

    def durations(self) -> list[str]:
        return list(self.manifest.durations)

    def require_pictures(self) -> None:
        """InputError: features that are no pictures."""
        for side in ("event", "target"):
            spec = getattr(self.manifest.features, side)
            if len(spec.shape) != 3 or spec.shape[0] != 3 or spec.dtype != "uint8":
                raise InputError(
                    f"{self.folder}: its {side} features, {spec}, are no pictures of 3 colours; encode the store of "
                    "pixels, or prepare the recordings with encoders."
                )

    def tasks(self) -> list[SourceTask]:
        """Return one task for each file."""
        return sorted((_task(file) for file in self.manifest.files), key=lambda task: task.name)

    def pairs(self, task: SourceTask) -> Iterator[RawPair]:
        """Yield the pairs of a file, verified as it is read."""
        table = read_part(self.folder, PartRecord(**task.spec))
        event_NCHW, target_NCHW = (
            feature_matrix(table[side], spec).reshape(-1, *spec.shape)
            for side, spec in (("event", self.manifest.features.event), ("target", self.manifest.features.target))
        )
        rows = table.drop_columns(["event", "target"]).to_pylist()
        for row, event_CHW, target_CHW in zip(rows, event_NCHW, target_NCHW, strict=True):
            yield RawPair(
                row["sequence"],
                row["t_start_us"],
                row["t_end_us"],
                event_CHW.transpose(1, 2, 0),
                target_CHW.transpose(1, 2, 0),
                **{name: row.get(name) for name in FACT_COLUMNS},
            )


def _task(file: PartRecord) -> SourceTask:
    return SourceTask(Path(file.name).stem, file.pairs, file.model_dump())
