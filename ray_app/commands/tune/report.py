"""`sweep.html`: trials, figures and verdict of a sweep on one page that loads nothing from outside its folder."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_app.commands.tune.figures import (
    history_figure,
    importance_figure,
    parallel_figure,
    pareto_figure,
    slice_figures,
)
from ray_app.commands.tune.final_training import final_result
from ray_app.commands.tune.searchers import TrialRecord, importances
from ray_app.commands.tune.spec import SweepSpec, describe_space, space_of
from ray_app.commands.tune.sweep_dir import PAGE, SweepDir, Trial, best_of, ranked
from ray_app.core.metrics import THETA, rate_key
from ray_app.reports.html import Cell, Facts, Figure, Outcome, Row, Section, Table, page


def write_page(folder: SweepDir) -> Path:
    """Write the page from what is on disk; return its path."""
    folder.write(PAGE, render_page(folder).encode())
    return folder.path / PAGE


def render_page(folder: SweepDir) -> str:
    """Return the whole page."""
    about, spec, trials, lines = folder.metadata(), folder.spec, folder.trials(), folder.entries()
    best = best_of(trials)
    finals = [line for line in lines if line["kind"] == "final_seed" and best and line["trial"] == best.name]
    final = final_result(finals, folder) if finals else None
    second = spec.secondary_objective or "parameters"
    baselines = {key: max(part["baselines"].values()) for key, part in about["data"].items()}
    if spec.objective == "lift":
        baselines = dict.fromkeys(baselines, 0.0)
    sections = [
        *([Section("The winner on the test part", [finals_table(finals)])] if finals else []),
        *(sweep_figures(spec, trials, baselines, second) if best else []),
        Section("Baselines on the validation part", [baselines_table(about["data"])]),
        Section("Trials", [trials_block(folder, ranked(trials), spec.secondary_objective == "latency_ms")]),
        Section("The sweep", [Facts(list(facts(about, spec, lines)))]),
    ]
    return page(
        f"Sweep: {about['name']}",
        headline(best, final, len(trials)),
        f"Sweep {about['name']}",
        notes(about, trials, best),
        sections,
        sweep_outcome(best, final),
    )


def headline(best: Trial | None, final: dict[str, Any] | None, num: int) -> str:
    """Result of the sweep in one sentence."""
    if final:
        return str(final["sentence"])
    if best is None or best.objective is None or best.accept_rate is None or best.lift is None:
        return f"None of {num} trials finished an epoch."
    ahead = "ahead of" if best.lift > 0 else "not ahead of"
    return (
        f"The best of {num} trials is accepted for {100 * best.accept_rate:.1f} % of the validation pairs at "
        f"θ {rate_key(THETA)}, {ahead} the best baseline: lift {100 * best.lift:+.1f} percentage points."
    )


def sweep_outcome(best: Trial | None, final: dict[str, Any] | None) -> Outcome:
    """Return `beats`, `unsure` or `loses`; never `beats` from validation alone."""
    if final:
        lift = final["test"]["lift"]
        return "beats" if lift["min"] > 0 else "unsure" if lift["max"] > 0 else "loses"
    return "unsure" if best and (best.lift or 0.0) > 0 else "loses"


def notes(about: dict[str, Any], trials: list[Trial], best: Trial | None) -> list[dict[str, Any]]:
    """Warnings and context of the numbers."""
    warnings, context = [], []
    if best and best.lift is not None and best.lift <= 0:
        warnings.append(
            "No lift: the best trial is no better than the best rule without learning. It is the best of this "
            "search, and not yet worth serving."
        )
    if failed := sum(trial.status == "failed" for trial in trials):
        warnings.append(f"{failed} of {len(trials)} trials failed; the table says why.")
    for key, part in about["data"].items():
        which = "" if len(about["data"]) == 1 else f" of durations {key}"
        context.append(
            f"The validation part{which} has {part['val']} pairs of {part['val_sequences']} "
            f"drives: one pair is {100 / part['val']:.1f} points, and the best of many "
            "trials is partly the luckiest. The winner is evaluated on the test part, which the search never reads."
        )
    if about["source"]["name"] == "scenes":
        context.append("The pairs are rendered scenes, not recordings: both sides come from a simulation.")
    elif about["source"].get("events") == "simulated":
        context.append("The events are simulated from the video; no event camera recorded them.")
    return [{"text": text, "warning": True} for text in warnings] + [
        {"text": text, "warning": False} for text in context
    ]


def figure_section(title: str, svg: str, alt: str, caption: str) -> Section:
    """Section of one figure; `alt`: its text for screen readers."""
    return Section(title, [Figure(svg, alt, caption)])


def sweep_figures(
    spec: SweepSpec, trials: list[Trial], baselines: dict[str, float], second: str
) -> Iterator[Section]:
    """Section of each figure."""
    name = f"{'lift' if spec.objective == 'lift' else f'accepted at {rate_key(THETA)}'}, %"
    space, best = space_of(spec), best_of(trials)
    assert best is not None
    scored = [trial for trial in trials if trial.objective is not None and trial.status != "failed"]
    yield figure_section(
        "The best so far",
        history_figure(scored, space, baselines, name),
        f"The objective of each trial and the best so far, which reaches {100 * (best.objective or 0.0):.1f} "
        "percent.",
        "A dot is a trial: the objective of its best checkpoint.",
    )
    yield figure_section(
        "What was tried",
        parallel_figure(scored, space, name),
        f"Parallel coordinates of {len(scored)} trials. The best: {describe_space(best.setting)}.",
        "A line is a trial, the darker the better.",
    )
    records = [
        TrialRecord(t.setting, "finished", (t.objective,), t.epochs) for t in scored if t.objective is not None
    ]
    shares = importances(space, records, spec.seed)
    if shares:
        yield figure_section(
            "What mattered",
            importance_figure(scored, space, list(shares), spec.seed, name),
            "Importance of each setting: " + ", ".join(f"{k} {100 * v:.0f} percent" for k, v in shares.items()),
            "Share of the objective's variance, by fANOVA (Hutter et al. 2014) over the trials that did "
            "not fail. With a dozen trials it is a hint, with a hundred a measurement.",
        )
        yield figure_section(
            "Values of each setting",
            slice_figures(scored, space, name),
            f"The objective of every trial over its value of {', '.join(space)}.",
            "A dot is a trial, the darker the later.",
        )
    yield figure_section(
        "What it costs",
        pareto_figure(scored, space, second, name),
        f"The objective against {second}, with the front of trials that no other beats in both.",
        "Red: no other trial is better in both.",
    )


def row(folder: SweepDir, trial: Trial) -> dict[str, Any]:
    """A trial's row of the table, with a link to its checkpoint if it is kept."""
    best = folder.run(trial.name).best_on_disk
    return {
        "trial": trial,
        "setting": describe_space(trial.setting),
        "checkpoint": f"trials/{trial.name}/{best}" if best else None,
    }


def facts(about: dict[str, Any], spec: SweepSpec, lines: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Name and value of each fact of the sweep."""
    starts = sum(line["kind"] == "run_started" for line in lines)
    yield "searched", "\n".join(f"{name}: {value}" for name, value in spec.space.items())
    yield "base", "\n".join(f"{name}: {value}" for name, value in spec.base.items()) or "nothing"
    yield "objective", f"{spec.objective} on the validation part, at the checkpoint of the lowest validation loss"
    yield "search algorithm, scheduler", f"{spec.search_alg} (seed {spec.seed}), {spec.scheduler}"
    limits = ", ".join(
        f"{n} {getattr(spec, n)}" for n in ("max_trials", "max_hours", "max_gpu_hours") if getattr(spec, n)
    )
    yield "budget", limits
    yield "started", f"{starts} times"
    yield "fingerprint of the store", about["store_fingerprint"]


def trial_lift_cell(lift: float) -> Cell:
    """A lift in percentage points, coloured by its sign."""
    return Cell(f"{100 * lift:+.1f}", "good" if lift > 0 else "bad")


def finals_table(finals: list[dict[str, Any]]) -> Table:
    """The winner's evaluations, one for each seed."""
    rows = []
    for line in finals:
        test = line["test"]
        low, high = (100 * bound for bound in test["interval95"]["lift"])
        cells = [
            f"{100 * test['accept_rate']:.1f} %",
            trial_lift_cell(test["lift"]),
            f"{low:+.1f} to {high:+.1f}",
            test["best_baseline"],
            f"{test['centered_cos_sim_mean']:.3f}",
            Cell("report", href=line["report"]),
        ]
        rows.append(Row(str(line["seed"]), cells))
    return Table(
        [
            "seed",
            "accepted at 0.80",
            "lift (points)",
            "95 % interval of the lift",
            "best baseline",
            "centred cosine",
            "report",
        ],
        rows,
        "The best setting, trained again on training and validation parts and evaluated on the test part, once for "
        "each seed.",
    )


def baselines_table(data: dict[str, Any]) -> Table:
    """Sizes of the parts and the baselines on the validation part, one row for each set of durations."""
    names = list(next(iter(data.values()))["baselines"])
    rows = [
        Row(
            key,
            [
                *(str(part[name]) for name in ("train", "val", "test")),
                *(f"{100 * value:.1f} %" for value in part["baselines"].values()),
            ],
        )
        for key, part in data.items()
    ]
    return Table(
        ["durations", "train", "validation", "test", *names],
        rows,
        "cosine_accept_rate at θ 0.80 of rules without learning. Each trial is also compared with its own outputs "
        "against other pairs' targets (shuffled).",
    )


def trials_block(folder: SweepDir, trials: list[Trial], latency: bool) -> Table:
    """Every trial; `latency`: with the milliseconds for one pair."""
    rows = []
    for trial in trials:
        line = row(folder, trial)
        cells = [
            trial.status,
            str(trial.epochs),
            "" if trial.accept_rate is None else f"{100 * trial.accept_rate:.1f} %",
            "" if trial.lift is None else trial_lift_cell(trial.lift),
            f"{trial.parameters:,}",
            *(["" if trial.latency_ms is None else f"{trial.latency_ms:.2f}"] if latency else []),
            f"{trial.seconds / 60:.1f}",
            line["setting"] + (f". {trial.reason}" if trial.reason else ""),
        ]
        rows.append(Row(Cell(trial.name, href=line["checkpoint"] or ""), cells))
    heads = ["trial", "status", "epochs", "accepted at 0.80", "lift", "parameters"]
    return Table(
        [*heads, *(["ms for one pair"] if latency else []), "minutes", "setting"],
        rows,
        "At the checkpoint of the lowest validation loss. Lift is over the best baseline, in percentage points.",
        wrapped="setting",
    )
