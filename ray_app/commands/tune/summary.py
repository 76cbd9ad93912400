"""Result of a sweep: the --json object of `ray-app tune`."""

from typing import Any

from ray_app.commands.tune.final_training import final_result
from ray_app.commands.tune.sweep_dir import SweepDir, best_of, pareto_front

STATUS_WORDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}


def sweep_summary(folder: SweepDir) -> dict[str, Any]:
    """Return the --json object, from what the sweep left on disk."""
    trials, lines = folder.trials(), folder.entries()
    best = best_of(trials)
    finals = [line for line in lines if line["kind"] == "final_seed" and best and line["trial"] == best.name]
    return {
        "sweep": str(folder),
        "status": STATUS_WORDS.get(lines[-1].get("status", ""), "running"),
        "best": best
        and {
            "trial": best.name,
            "config": best.setting,
            "objective": best.objective,
            "lift": best.lift,
            "parameters": best.parameters,
            "checkpoint": best_checkpoint(folder, best.name),
        },
        "pareto_front": [
            trial.name for trial in pareto_front(trials, folder.spec.secondary_objective or "parameters")
        ],
        "trials": [
            {
                "id": trial.name,
                "status": trial.status,
                "objective": trial.objective,
                "lift": trial.lift,
                "steps": trial.steps,
                "epochs": trial.epochs,
                "parameters": trial.parameters,
                "latency_ms": trial.latency_ms,
                "seconds": round(trial.seconds, 3),
                "config": trial.setting,
                "reason": trial.reason,
            }
            for trial in trials
        ],
        "final": final_result(finals, folder) if finals else None,
        "files": folder.files(),
    }


def best_checkpoint(folder: SweepDir, name: str) -> str | None:
    """Path or URI of a trial's best checkpoint, if it is kept."""
    run = folder.run(name)
    return run.shown(run.path / run.best_on_disk) if run.best_on_disk else None
