"""The folder of a training run: where its checkpoints lie, which is best, and where to go on from."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ray_app.core.adapter import Adapter
from ray_app.errors import CheckpointError, StoreError
from ray_app.store.checkpoint import save_checkpoint, save_training_state, verify_folder
from ray_app.store.durable import write_file
from ray_app.store.manifest import Features

RUN, BEST = "run.json", "best.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`checkpoints/epoch_NNNN` and `training_state/epoch_NNNN` below `path`."""

    path: Path
    """The run's folder."""

    def claim(self, about: Mapping[str, Any]) -> None:
        """Starts a run here. StoreError if anything is in the way; nothing is deleted."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise StoreError(f"--out {self.path} already holds something; name a new folder, nothing is overwritten")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_file(self.path / RUN, json.dumps(dict(about), indent=1).encode())
        except OSError as error:
            raise StoreError(f"--out {self.path} cannot be written: {error.strerror}") from error

    def checkpoint(self, epoch: int) -> Path:
        """Where the weights after so many epochs lie."""
        return self.path / "checkpoints" / f"epoch_{epoch:04d}"

    def state(self, epoch: int) -> Path:
        """Where what is needed to go on after so many epochs lies."""
        return self.path / "training_state" / f"epoch_{epoch:04d}"

    def save(
        self,
        epoch: int,
        adapter: Adapter,
        *,
        features: Features,
        metrics: Mapping[str, Any],
        provenance: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        best_epoch: int,
    ) -> None:
        """State first, weights after it, then `settle`. Interrupted at any point, the epoch before is still whole."""
        for leftover in (self.state(epoch), self.checkpoint(epoch)):
            if leftover.exists():  # of a start that ended between the two, or was set aside as damaged
                leftover.rename(leftover.with_name(f".aside-{leftover.name}-{leftover.stat().st_mtime_ns}"))
        save_training_state(self.state(epoch), tensors, meta)
        save_checkpoint(self.checkpoint(epoch), adapter, metrics=metrics, provenance=provenance, features=features)
        self.settle(epoch, best_epoch)

    def settle(self, epoch: int, best_epoch: int) -> None:
        """Names the best checkpoint; then the run's own older files go.

        What stays: the best and the newest weights, the newest state. A second call changes nothing.
        """
        best = {"checkpoint": f"checkpoints/epoch_{best_epoch:04d}", "epoch": best_epoch}
        write_file(self.path / BEST, json.dumps(best).encode())
        keep = {self.checkpoint(epoch), self.checkpoint(best_epoch), self.state(epoch)}
        for parent in ("checkpoints", "training_state"):
            for old in (self.path / parent).glob("epoch_*"):
                if old not in keep:
                    shutil.rmtree(old)

    def newest_state(self) -> Path | None:
        """The newest state that verifies and whose weights do too, or None."""
        for folder in sorted((self.path / "training_state").glob("epoch_*"), reverse=True):
            try:
                verify_folder(folder)
                verify_folder(self.path / "checkpoints" / folder.name)
            except CheckpointError:  # killed between the two, or damaged: the one before is whole
                continue
            return folder
        return None

    def best(self) -> Path | None:
        """The best checkpoint so far, or None before the first epoch."""
        path = self.path / BEST
        return self.path / json.loads(path.read_text())["checkpoint"] if path.is_file() else None
