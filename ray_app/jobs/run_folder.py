"""The folder of a training run: where its checkpoints lie, which is best, and where to go on from.

A place in a run is named by its finished epochs, and within an epoch by the optimizer step too: `epoch_0002`
< `epoch_0002_step_00000300` < `epoch_0003`. Weights and training state of a place lie under that name.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ray_app.core.adapter import Adapter
from ray_app.errors import CheckpointError, StoreError
from ray_app.store.checkpoint import save_checkpoint, save_training_state, verify_folder
from ray_app.store.durable import write_file, writing
from ray_app.store.manifest import Features

RUN, BEST, STOP, RESIZE = "run.json", "best.json", "stop", "resize"
KEPT_PLACES = 2
"""Newest places of which everything is kept."""


def place(epoch: int, step: int | None = None) -> str:
    """The name of a place: after so many whole epochs, or at an optimizer step within the next."""
    return f"epoch_{epoch:04d}" if step is None else f"epoch_{epoch:04d}_step_{step:08d}"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`checkpoints/epoch_NNNN` and `training_state/epoch_NNNN` below `path`."""

    path: Path
    """The run's folder."""

    def claim(self, about: Mapping[str, Any]) -> None:
        """Starts a run here. StoreError if anything is in the way; nothing is deleted."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise StoreError(f"--out {self.path} already holds something; name a new folder, nothing is overwritten")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_file(self.path / RUN, json.dumps(dict(about), indent=1).encode())

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Holds the run for one driver. StoreError if another process of this machine drives it."""
        handle = os.open(self.path / RUN, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"{self.path} is a run that goes on in another process; wait, or stop it") from error
            self.stop_file.unlink(missing_ok=True)
            self.resize_file.unlink(missing_ok=True)
            yield
        finally:
            os.close(handle)

    def about(self) -> dict[str, Any]:
        """What the run was started with: `name`, `key`, `config`, `store_fingerprint`. StoreError: not a run."""
        try:
            return json.loads((self.path / RUN).read_text())
        except (OSError, ValueError) as error:
            raise StoreError(f"{self.path} is not the folder of a run: {RUN} cannot be read ({error})") from error

    @property
    def stop_file(self) -> Path:
        """Where it lies, the workers save and end."""
        return self.path / STOP

    @property
    def resize_file(self) -> Path:
        """Where it lies, they do so too, and others begin in their place."""
        return self.path / RESIZE

    def asked_to_save_and_end(self) -> bool:
        """One of the two lies there."""
        return self.stop_file.exists() or self.resize_file.exists()

    def checkpoint(self, name: str) -> Path:
        """Where the weights of a place lie."""
        return self.path / "checkpoints" / name

    def state(self, name: str) -> Path:
        """Where what is needed to go on from a place lies."""
        return self.path / "training_state" / name

    def save(
        self,
        name: str,
        adapter: Adapter,
        *,
        features: Features,
        metrics: Mapping[str, Any],
        provenance: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        best_epoch: int,
    ) -> None:
        """State first, weights after it, then `settle`. Interrupted at any point, the place before is still whole."""
        with writing(self.path):
            if self.state(name).exists():  # of a save that ended between the two
                shutil.rmtree(self.state(name))
            if self.checkpoint(name).exists():  # its state was damaged and is set aside
                set_aside(self.checkpoint(name))
        save_training_state(self.state(name), tensors, meta)
        save_checkpoint(self.checkpoint(name), adapter, metrics=metrics, provenance=provenance, features=features)
        self.settle(name, best_epoch)

    def settle(self, newest: str, best_epoch: int) -> None:
        """Names the best checkpoint; then the run's own older files go.

        What stays: the newest two places whole, for the newest may be damaged one day, and the weights that were the
        best at each of them. A second call changes nothing.
        """
        if best_epoch:
            best = {"checkpoint": f"checkpoints/{place(best_epoch)}", "epoch": best_epoch}
            write_file(self.path / BEST, json.dumps(best).encode())
        states = sorted(path.name for path in self.state("").glob("epoch_*") if path.name < newest)
        keep = {newest, *states[-(KEPT_PLACES - 1) :]}
        best_of_each = {best_epoch, *(self._best_epoch_at(name) for name in keep - {newest})}
        keep_weights = keep | {place(epoch) for epoch in best_of_each if epoch}
        for parent, kept in ((self.checkpoint(""), keep_weights), (self.state(""), keep)):
            for old in parent.glob("epoch_*"):
                if old.name not in kept:
                    with writing(old):
                        shutil.rmtree(old)

    def _best_epoch_at(self, name: str) -> int:
        """Which epoch was the best when a place was saved; 0 where that is unknown."""
        try:
            return json.loads((self.state(name) / "training_state.json").read_text())["counters"]["best_epoch"]
        except (OSError, ValueError, KeyError):  # damaged: it will never be gone on from
            return 0

    def newest_state(self) -> str | None:
        """Name of the newest place whose state and weights verify, or None.

        A newer one that does not verify gets another name, and is told on standard error: so one process calls this.
        """
        for state in sorted(self.state("").glob("epoch_*"), reverse=True):
            weights = self.checkpoint(state.name)
            if not weights.exists():
                continue  # a save that was cut off
            for folder in (weights, state):
                try:
                    verify_folder(folder)
                except CheckpointError as error:
                    print(f"not gone on from: {error}", file=sys.stderr)
                    with writing(self.path):
                        set_aside(folder)
                    break
            else:
                return state.name
        return None

    def best(self) -> Path | None:
        """The best checkpoint so far, or None before the first epoch."""
        path = self.path / BEST
        return self.path / json.loads(path.read_text())["checkpoint"] if path.is_file() else None


def set_aside(folder: Path) -> None:
    """Renames a folder that must not be used; nothing is deleted."""
    folder.rename(folder.with_name(f".aside-{folder.name}-{folder.stat().st_mtime_ns}"))
