"""Population-based training: what falls behind goes on from the weights of what leads, with a setting near its own.

Each such step is a trial of its own in the record, with the member's number: its setting, its log, whose weights
it began with. Ray Tune decides who goes on from whom; weights go from run folder to run folder.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Checkpoint
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from ray_app.commands.tune.spec import Dimension, Range, Setting, Space
from ray_app.config.train import TrainConfig
from ray_app.errors import CheckpointError, TrainingError
from ray_app.runs.run_dir import CHECKPOINTS, STATES, RunDir, checkpoint_name
from ray_app.store.checkpoint import load_checkpoint, load_training_state, save_checkpoint, save_training_state

TRIES = 5
"""Looks at a run that goes on and lets its older places go meanwhile."""


def mutation(dimension: Dimension) -> Any:
    """A dimension as Tune mutates it."""
    if isinstance(dimension, Range):
        return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)
    return list(dimension.values)


def inside(space: Space, setting: Setting) -> Setting:
    """The setting, with numbers that a mutation took out of their span brought back to its end."""
    limited = {}
    for name, value in setting.items():
        dimension = space[name]
        limited[name] = min(max(value, dimension.low), dimension.high) if isinstance(dimension, Range) else value
    return limited


class Population(PopulationBasedTraining):
    """Tune's scheduler, which asks the record for the trial that goes on."""

    def __init__(
        self, space: Space, every: int, num_epochs: int, go_on: Callable[[str, str, Setting], dict[str, Any]]
    ) -> None:
        """`go_on`: (member, whose weights it takes, new setting) to the config of the trial that goes on."""
        super().__init__(
            time_attr="epoch",
            metric="compared",
            mode="max",
            perturbation_interval=every,
            hyperparam_mutations={"trial": {"setting": {name: mutation(each) for name, each in space.items()}}},
            log_config=False,
        )
        self._space, self._num_epochs, self._go_on = space, num_epochs, go_on

    def on_trial_result(self, tune_controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        if result.get("epoch", 0) >= self._num_epochs:
            return TrialScheduler.CONTINUE  # it is done: nothing is left to exchange weights for
        return super().on_trial_result(tune_controller, trial, result)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it for a restore that is never asked of it here

    def _get_new_config(self, trial: TuneTrial, trial_to_clone: TuneTrial) -> tuple[dict[str, Any], dict[str, Any]]:
        found, operations = super()._get_new_config(trial, trial_to_clone)
        setting = inside(self._space, found["trial"]["setting"])
        member, donor = (each.config["trial"]["name"] for each in (trial, trial_to_clone))
        return {"trial": self._go_on(member, donor, setting)}, operations


@contextmanager
def mark(run: RunDir) -> Iterator[Any]:
    """What Tune keeps as a checkpoint: where the run is. The weights lie there."""
    with tempfile.TemporaryDirectory(prefix="ray-app-") as folder:
        (Path(folder) / "run.txt").write_text(str(run))
        yield Checkpoint.from_directory(folder)


def adopt(donor: RunDir, run: RunDir, cfg: TrainConfig, provenance: dict[str, Any]) -> None:
    """Begins a run with the weights and moments of another's newest place before its end; once and no more.

    What was best is forgotten: under other loss weights the losses of before cannot be compared. TrainingError: there
    is no whole place in the donor.
    """
    if run.latest_resumable() is not None:
        return
    for _ in range(TRIES):
        for name in sorted(donor.places(STATES), reverse=True):
            if name >= checkpoint_name(cfg.num_epochs):
                continue
            try:
                donor.download(f"{STATES}/{name}", f"{CHECKPOINTS}/{name}")
                tensors, meta = load_training_state(donor.state(name))
                weights = load_checkpoint(donor.checkpoint(name))
            except (CheckpointError, OSError):  # let go of, or still being written
                continue
            counters = {**meta["counters"], "best_loss": float("inf"), "best_epoch": 0, "waited": 0}
            schedule = {**meta["scheduler"], "best": float("inf"), "num_bad_epochs": 0}
            meta |= {"counters": counters, "scheduler": schedule, "learning_rate": cfg.learning_rate}
            save_training_state(run.state(name), tensors, meta)
            save_checkpoint(
                run.checkpoint(name),
                weights.adapter,
                metrics=weights.metrics,
                provenance=provenance,
                features=weights.features,
            )
            for kind in (STATES, CHECKPOINTS):
                run.upload(f"{kind}/{name}")
            return
    raise TrainingError(f"{donor} holds no whole place to go on from")
