"""The folder of a training run: where its checkpoints lie, which is best, and where to go on from.

A place in a run is named by its finished epochs, and within an epoch by the optimizer step too: `epoch_0002`
< `epoch_0002_step_00000300` < `epoch_0003`. Weights and training state of a place lie under that name.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ray_app.core.adapters.base import Adapter
from ray_app.errors import CheckpointError, StoreError
from ray_app.runs.event_log import EventLog
from ray_app.store.atomic import disk_errors, partial_file, write_file
from ray_app.store.checkpoint import save_checkpoint, save_training_state, verify_folder
from ray_app.store.filesystem import LocalDir, StorageDir
from ray_app.store.manifest import Features

RUN, BEST, STOP, RESIZE = "run.json", "best.json", "stop", "resize"
CHECKPOINTS, STATES, QUARANTINE = "checkpoints", "training_state", "quarantine"
NUM_CHECKPOINTS_KEPT = 2
"""Newest places of which everything is kept."""


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """The name of a place: after so many whole epochs, or at an optimizer step within the next."""
    return f"epoch_{epoch:04d}" if step is None else f"epoch_{epoch:04d}_step_{step:08d}"


@dataclass(frozen=True, slots=True)
class RunDir:
    """`checkpoints/epoch_NNNN` and `training_state/epoch_NNNN` below `path`."""

    path: Path
    """The run's folder."""

    def __str__(self) -> str:
        """What `--resume` and `sync` take."""
        return str(self.path)

    def shown(self, path: Path) -> str:
        """A file or folder of the run by the name that holds everywhere."""
        return str(path)

    def event_log(self) -> AbstractContextManager[EventLog]:
        """The event log, for the one process that writes it now."""
        return EventLog(self.path)

    def synced(self) -> AbstractContextManager[None]:
        """Meanwhile what workers do shows up in `path`, and the signs that lie there reach them."""
        return nullcontext()

    def released(self, log: EventLog) -> AbstractContextManager[None]:
        """Another process may write to the event log meanwhile; this one, which has it open, does not."""
        return log.released()

    @property
    def resume(self) -> str:
        """The command that goes on with it."""
        return f"ray-app train --resume {shlex.quote(str(self))}"

    def refresh(self) -> None:
        """All that is told of the run so far lies in `path` afterwards."""

    def download(self, *folders: str) -> None:
        """These folders of the run, where there are such, lie in `path` afterwards."""

    def upload(self, folder: str) -> None:
        """A folder that was made in `path` is the run's afterwards."""

    def create(self, about: Mapping[str, Any]) -> None:
        """Starts a run here. StoreError if anything is in the way; nothing is deleted.

        A claim that was killed before it had its name is not in the way.
        """
        claimed = self.path / RUN
        if self.path.exists() and (not self.path.is_dir() or {*self.path.iterdir()} - {partial_file(claimed)}):
            raise StoreError(f"--out {self.path} already holds something; name a new folder, nothing is overwritten")
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_file(claimed, json.dumps(dict(about), indent=1).encode())

    @property
    def claimed(self) -> bool:
        """A run was started here."""
        return (self.path / RUN).is_file()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Holds the run for one driver. StoreError if another process of this machine drives it."""
        handle = os.open(self.path / RUN, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(f"{self.path} is a run that goes on in another process; wait, or stop it") from error
            self.clear_signals()
            yield
        finally:
            os.close(handle)

    def metadata(self) -> dict[str, Any]:
        """What the run was started with: `name`, `key`, `config`, `store_fingerprint`. StoreError: not a run."""
        return run_metadata(LocalDir(self.path))

    @property
    def stop_file(self) -> Path:
        """Where it lies, the workers save and end."""
        return self.path / STOP

    @property
    def resize_file(self) -> Path:
        """Where it lies, they do so too, and others begin in their place."""
        return self.path / RESIZE

    def clear_signals(self) -> None:
        """Neither of the two lies there afterwards."""
        self.stop_file.unlink(missing_ok=True)
        self.resize_file.unlink(missing_ok=True)

    def request_stop(self) -> None:
        """Lays the first of them there, before this process takes the event log over."""
        self.stop_file.touch()

    def stop_requested(self) -> bool:
        """One of the two lies there."""
        return self.stop_file.exists() or self.resize_file.exists()

    def checkpoint(self, name: str) -> Path:
        """Where the weights of a place lie."""
        return self.path / CHECKPOINTS / name

    def state(self, name: str) -> Path:
        """Where what is needed to go on from a place lies."""
        return self.path / STATES / name

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
        with disk_errors(self.path):
            if self.state(name).exists():  # of a save that ended between the two
                shutil.rmtree(self.state(name))
            if self.checkpoint(name).exists():  # its state was damaged and is set aside
                self._quarantine(f"{CHECKPOINTS}/{name}")
        save_training_state(self.state(name), tensors, meta)
        save_checkpoint(self.checkpoint(name), adapter, metrics=metrics, provenance=provenance, features=features)
        self.prune_checkpoints(name, best_epoch)

    def prune_checkpoints(self, newest: str, best_epoch: int) -> None:
        """Names the best checkpoint; then the run's own older files go.

        What stays: the newest two places whole, for the newest may be damaged one day, and the weights that were the
        best at each of them. A second call changes nothing.
        """
        if best_epoch:
            best = {"checkpoint": f"{CHECKPOINTS}/{checkpoint_name(best_epoch)}", "epoch": best_epoch}
            self._there.write(BEST, json.dumps(best).encode())
        states = sorted(name for name in self.places(STATES) if name < newest)
        keep = {newest, *states[-(NUM_CHECKPOINTS_KEPT - 1) :]}
        best_of_each = {best_epoch, *(self._best_epoch_at(name) for name in keep - {newest})}
        keep_weights = keep | {checkpoint_name(epoch) for epoch in best_of_each if epoch}
        for kind, kept in ((CHECKPOINTS, keep_weights), (STATES, keep)):
            for old in sorted(self.places(kind) - kept):
                self._drop(f"{kind}/{old}")

    @property
    def _there(self) -> StorageDir:
        """What the next start goes on from."""
        return LocalDir(self.path)

    def places(self, kind: str) -> set[str]:
        """Names of the places that have weights, or state."""
        try:
            return {name for name in self._there.listdir(kind) if name.startswith("epoch_")}
        except FileNotFoundError:
            return set()

    def delete_checkpoints(self, kind: str, kept: str | None = None) -> None:
        """Weights, or states, of all places but one go; `kept` is a folder in the run."""
        for name in self.places(kind):
            if f"{kind}/{name}" != kept:
                self._drop(f"{kind}/{name}")

    def _drop(self, folder: str) -> None:
        with disk_errors(self.path / folder):
            self._there.delete(folder)

    def _best_epoch_at(self, name: str) -> int:
        """Which epoch was the best when a place was saved; 0 where that is unknown."""
        try:
            return json.loads(self._there.read(f"{STATES}/{name}/training_state.json"))["counters"]["best_epoch"]
        except (OSError, ValueError, KeyError):  # damaged: it will never be gone on from
            return 0

    def latest_resumable(self) -> str | None:
        """Name of the newest place whose state and weights verify, or None.

        A newer one that does not verify gets another name, and is told on standard error: so one process calls this.
        """
        for name in sorted(self.places(STATES) & self.places(CHECKPOINTS), reverse=True):  # else a save cut off
            if all(self._sound(f"{kind}/{name}") for kind in (CHECKPOINTS, STATES)):
                return name
        return None

    def _sound(self, folder: str) -> bool:
        try:
            verify_folder(self.path / folder)
        except CheckpointError as error:
            print(f"not gone on from: {error}", file=sys.stderr)
            with disk_errors(self.path):
                self._quarantine(folder)
            return False
        return True

    def _quarantine(self, folder: str) -> None:
        """Move a folder that must not be used to `quarantine/`; nothing is deleted."""
        path = self.path / folder
        aside = self.path / QUARANTINE / f"{folder}-{path.stat().st_mtime_ns}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        path.rename(aside)

    def best(self) -> Path | None:
        """The best checkpoint so far, or None before the first epoch. CheckpointError: nobody knows which."""
        name = best_name(self._there)
        return self.path / name if name else None

    @property
    def best_on_disk(self) -> str | None:
        """The folder in the run of the best checkpoint so far, where it has not been let go of."""
        name = best_name(self._there)
        return name if name and Path(name).name in self.places(CHECKPOINTS) else None


def validate_relative_path(folder: str) -> str:
    """The name of a folder within a run, as others have written it. ValueError: it leads out of the run."""
    if not re.fullmatch(r"[a-z_]+(/[a-z0-9_]+)?", folder):
        raise ValueError(f"{folder!r} is no folder of a run")
    return folder


def run_metadata(there: StorageDir) -> dict[str, Any]:
    """What the run that lies there was started with. StoreError: not a run."""
    try:
        return json.loads(there.read(RUN))
    except (OSError, ValueError) as error:
        raise StoreError(f"{there} is not the folder of a run: {RUN} cannot be read ({error})") from error


def best_name(there: StorageDir) -> str | None:
    """The folder of the best checkpoint of the run that lies there, None before the first epoch. CheckpointError:
    what names it is damaged."""
    try:
        return validate_relative_path(json.loads(there.read(BEST))["checkpoint"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{there.file(BEST)} is damaged: it names no checkpoint ({error}).") from error
