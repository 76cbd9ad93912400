"""Final training: the winner, trained on all but the test part with several seeds, and evaluated on the test part.

The number of epochs is that of the trial's best checkpoint, since no validation part is left to stop early by. The
test part is read here for the first time, once for each seed. The first seed is the one to promote, whatever its
result.
"""

import shlex
import statistics
import time
from typing import Any

from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.evaluate.drafting import draft_context, draft_result
from ray_app.commands.train.command import run_train
from ray_app.commands.tune.space import train_config
from ray_app.commands.tune.sweep_dir import SweepDir
from ray_app.commands.tune.trials import Trial
from ray_app.config.base import SplitFlags
from ray_app.config.evaluate import EvaluateConfig, EvaluationFlags
from ray_app.config.train import TrainConfig
from ray_app.config.tune import TOKENS, TuneConfig
from ray_app.core.thresholds import THETA, rate_key
from ray_app.runs.event_log import EventLog
from ray_app.store.checkpoint import load_checkpoint
from ray_app.tracking.evaluation_log import log_evaluation
from ray_app.tracking.model_registry import checkpoint_folder

LOGGED_KEYS = (
    *("lift", "best_baseline", "interval95", "cos_sim_mean", "centered_cos_sim_mean", "pairs", "verdict"),
    "try_next",
)
"""Keys of an evaluation that are logged with its rate."""
DRAFT_KEYS = (
    *(TOKENS, "interval95", "baselines", "best_baseline", "gain", "cos_sim_mean", "pairs", "unit", "verdict"),
)
"""Keys of an evaluation of a drafter's part that are logged."""


def run_final(cfg: TuneConfig, folder: SweepDir, log: EventLog, best: Trial) -> None:
    """Train and evaluate each seed that the event log does not have yet, and log it."""
    done = {line["seed"] for line in final_seeds(folder, best)}
    for seed in sorted(set(range(cfg.num_final_seeds)) - done):
        run, train = folder.final(best.name, seed), final_config(cfg, folder, best, seed)
        checkpoint = run_train(train, parent_key=folder.metadata()["key"])["checkpoint"]
        shared = {name: getattr(train, name) for name in EvaluationFlags.model_fields if name != "batch_size"}
        if cfg.drafting:
            numbers = tested_drafter(cfg, checkpoint, EvaluationFlags(**shared))
            tested: dict[str, Any] = {"test": numbers, "report": None}
        else:
            report = run.path.with_name(f"{run.path.name}-report")
            evaluated = run_evaluate(EvaluateConfig(store=cfg.store, checkpoint=checkpoint, out=report, **shared))
            folder.upload(report)
            rate = {"accept_rate": evaluated["cosine_accept_rate"][rate_key(THETA)]}
            tested = {
                "test": rate | {key: evaluated[key] for key in LOGGED_KEYS},
                "report": str((report / "report.html").relative_to(folder.path)),
            }
        log.write(
            "final_seed",
            trial=best.name,
            seed=seed,
            run=str(run.path.relative_to(folder.path)),
            **tested,
            time=time.time(),
        )


def tested_drafter(cfg: TuneConfig, where: str, flags: EvaluationFlags) -> dict[str, Any]:
    """Evaluate a drafter's part on the test pairs, also in MLflow; return what is logged of it."""
    with checkpoint_folder(where, flags) as folder:
        checkpoint = load_checkpoint(folder)
        context = draft_context(flags, cfg.test_store, checkpoint)
        result = draft_result(context, checkpoint)
    log_evaluation(flags, checkpoint.provenance.get("run_key"), result, [])
    return {key: result[key] for key in DRAFT_KEYS}


def final_config(cfg: TuneConfig, folder: SweepDir, best: Trial, seed: int) -> TrainConfig:
    """Settings of the final training of one seed; a run that has started is resumed."""
    run = folder.final(best.name, seed)
    return train_config(
        cfg,
        best.setting,
        str(run),
        train_on_val=True,
        num_epochs=best.best_epoch,
        seed=seed,
        num_workers=cfg.final_workers,
        cpus_per_worker=None,
        resume=str(run) if run.claimed else None,
    )


def promote_command(run: str, train: TrainConfig, test_store: str | None = None) -> str:
    """Command that promotes a run, with the store that it is tested on and the split that it was trained with."""
    words = ["ray-app", "promote", run, *(["--store", test_store] if test_store else [])]
    for name, field in SplitFlags.model_fields.items():
        if (value := getattr(train, name)) != field.default:
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def final_seeds(folder: SweepDir, best: Trial | None) -> list[dict[str, Any]]:
    """Event log lines of the seeds of a trial's setting that are evaluated."""
    lines = folder.entries() if best else []
    return [line for line in lines if line["kind"] == "final_seed" and best and line["trial"] == best.name]


def final_result(folder: SweepDir, best: Trial | None) -> dict[str, Any] | None:
    """Mean and spread over seeds on the test part, a sentence of them, and the command that promotes the first.

    None before the first seed.
    """
    seeds = final_seeds(folder, best)
    if not best or not seeds:
        return None
    cfg = folder.config
    spread = {
        name: {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "min": min(values),
            "max": max(values),
        }
        for name in ((TOKENS, "gain") if cfg.drafting else ("accept_rate", "lift"))
        for values in [[line["test"][name] for line in seeds]]
    }
    rate, lift = spread.values()
    verdict = "beats the best baseline with every seed" if lift["min"] > 0 else "does not beat the best baseline"
    if lift["min"] <= 0 < lift["max"]:
        verdict = "beats the best baseline with some seeds and not with others"
    numbers = (
        f"cosine_accept_rate_{rate_key(THETA)} {100 * rate['mean']:.1f} % ± {100 * rate['std']:.1f} over "
        f"{len(seeds)} seeds, lift {100 * lift['mean']:+.1f} ± {100 * lift['std']:.1f} points"
    )
    if cfg.drafting:
        numbers = (
            f"{rate['mean']:.2f} ± {rate['std']:.2f} tokens per target pass over {len(seeds)} seeds, "
            f"{lift['mean']:+.2f} ± {lift['std']:.2f}"
        )
    runs = [folder.shown(folder.path / line["run"]) for line in seeds]
    return {
        "test": spread,
        "seeds": [{"seed": line["seed"], "run": run, **line["test"]} for line, run in zip(seeds, runs, strict=True)],
        "run": runs[0],
        "over_baseline": lift,
        "try_next": seeds[0]["test"].get("try_next"),
        "promote": promote_command(runs[0], train_config(cfg, best.setting), cfg.test_store),
        "sentence": f"On the test part the winner {verdict}: {numbers}.",
    }
