"""`sweep.html`: trials, figures and verdict of a sweep on one page that loads nothing from outside its folder.

Optuna draws the figures, from a study of the recorded trials.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import NullFormatter, PercentFormatter
from optuna.visualization import matplotlib as optuna_figures

from ray_app.commands.tune.final import final_result, final_seeds
from ray_app.commands.tune.progress import LIFT_HEAD, duration_words, trial_cells, trial_heads
from ray_app.commands.tune.space import Space, complete, describe, importances, read_space, study_of
from ray_app.commands.tune.sweep_dir import PAGE, SweepDir
from ray_app.commands.tune.trials import Trial, best_of, ranked, scored
from ray_app.config.tune import TOKENS, TuneConfig
from ray_app.core.thresholds import THETA, rate_key
from ray_app.reports.figures import FAINT, INK, NARROW, PALETTE, STYLE, WIDE, svg, to_svg
from ray_app.reports.html import Cell, Facts, Figure, Outcome, Row, Section, Table, Text, page

BASELINE = PALETTE[3]
"""Colour of the best baseline."""
SLICES = 3
"""Settings in a row of figures."""


def write_page(folder: SweepDir) -> None:
    """Write the page from what is on disk."""
    folder.write(PAGE, render_page(folder).encode())


def render_page(folder: SweepDir) -> str:
    """Return the whole page."""
    about, cfg, trials = folder.metadata(), folder.config, folder.trials()
    best = best_of(trials)
    final = final_result(folder, best)
    baselines = {key: max(part["baselines"].values()) for key, part in about["data"].items() if part["baselines"]}
    if cfg.objective == "lift":
        baselines = dict.fromkeys(baselines, 0.0)
    finals = draft_finals_table if cfg.drafting else finals_table
    sections = [
        *([Section("The winner on the test part", [finals(final_seeds(folder, best))])] if final else []),
        *(sweep_figures(cfg, trials, baselines) if best else []),
        *([Section("Baselines on the validation part", [baselines_table(about["data"])])] if baselines else []),
        Section("Trials", [trials_block(folder, trials, drafting=cfg.drafting)]),
        Section("The sweep", [Facts(list(facts(folder, about, cfg)))]),
        Section("Next", [Text(next_step(folder, best, final))]),
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
    if best and best.tokens_per_target_pass is not None:
        return (
            f"The best of {num} trials drafts {best.tokens_per_target_pass:.2f} tokens per target pass on the "
            "validation part."
        )
    if best is None or best.objective is None or best.accept_rate is None or best.lift is None:
        return f"None of {num} trials finished an epoch."
    ahead = "ahead of" if best.lift > 0 else "not ahead of"
    return (
        f"The best of {num} trials is accepted for {100 * best.accept_rate:.1f} % of the validation pairs at "
        f"θ {rate_key(THETA)}, {ahead} the best baseline: lift {100 * best.lift:+.1f} percentage points."
    )


def next_step(folder: SweepDir, best: Trial | None, final: dict[str, Any] | None) -> str:
    """Return the next step: promote the winner, or what to try instead."""
    if final:
        lifts = final["over_baseline"]["min"] > 0
        return f"promote the winner: {final['promote']}" if lifts or not final["try_next"] else str(final["try_next"])
    if best is None or best.lift is None or best.lift > 0:
        return f"finish the sweep: {folder.resume}"
    return "try next: a wider space, more pairs of more drives, or features of encoders (`ray-app encode`)"


def sweep_outcome(best: Trial | None, final: dict[str, Any] | None) -> Outcome:
    """Return `beats`, `unsure` or `loses`; never `beats` from validation alone."""
    if final:
        lift = final["over_baseline"]
        return "beats" if lift["min"] > 0 else "unsure" if lift["max"] > 0 else "loses"
    return "unsure" if best and (best.lift is None or best.lift > 0) else "loses"


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
        points = f": one pair is {100 / part['val']:.1f} points" if part["baselines"] else ""
        context.append(
            f"The validation part{which} has {part['val']} pairs of {part['val_sequences']} drives{points}, and the "
            "best of many trials is partly the luckiest. The winner is evaluated on the test part, which the search "
            "never reads."
        )
    if about["source"]["name"] == "scenes":
        context.append("The pairs are rendered scenes, not recordings: both sides come from a simulation.")
    elif about["source"].get("events") == "simulated":
        context.append("The events are simulated from the video; no event camera recorded them.")
    return [{"text": text, "warning": True} for text in warnings] + [
        {"text": text, "warning": False} for text in context
    ]


def sweep_figures(cfg: TuneConfig, trials: list[Trial], baselines: Mapping[str, float]) -> Iterator[Section]:
    """Section of each figure. `baselines`: the best of each set of window lengths, as fractions."""
    name = f"{'lift' if cfg.objective == 'lift' else f'accepted at {rate_key(THETA)}'}, %"
    if cfg.drafting:
        name = "tokens per target pass"
    space, second = read_space(cfg), cfg.secondary_objective or "parameters"
    best, *others = scored(trials)
    shown = complete(sorted((best, *others), key=lambda trial: trial.index))
    study = study_of(shown, space)
    yield figure_section(
        "The best so far",
        history_figure(study, baselines, name, shown.index(best)),
        f"The objective of each trial and the best so far, {name}: {best.shown_objective or 0.0:.2f} at the end.",
        f"A dot is a trial: the objective of its best checkpoint. The star: {best.name}, the best.",
    )
    if shares := importances(study, cfg.seed):
        yield figure_section(
            "What mattered",
            importance_figure(shares),
            "Importance of each setting: " + ", ".join(f"{k} {100 * v:.0f} percent" for k, v in shares.items()),
            "Share of the objective's variance, by fANOVA (Hutter et al. 2014) over the trials that did not fail. "
            "With a dozen trials it is a hint, with a hundred a measurement.",
        )
    yield figure_section(
        "What was tried",
        slice_figures(study, space, name),
        f"The objective of every trial over its value of {', '.join(space)}. The best: {describe(best.setting)}.",
        "A dot is a trial, the darker the later.",
    )
    yield figure_section(
        "What it costs",
        pareto_figure(shown, space, second, name, best),
        f"The objective against {second}, with the front of trials that no other beats in both.",
        f"Red: no other trial is better in both. The star: {best.name}, the best by the objective alone.",
    )


def figure_section(title: str, figure: str, alt: str, caption: str) -> Section:
    """Section of one figure; `alt`: its text for screen readers."""
    return Section(title, [Figure(figure, alt, caption)])


def history_figure(study: optuna.Study, baselines: Mapping[str, float], name: str, best: int) -> str:
    """Objective of each trial and the best so far, with the best baselines (as fractions). `best`: its number."""

    def draw(width: float) -> Any:
        axes = optuna_figures.plot_optimization_history(study, target_name=name)
        for key, value in baselines.items():
            label = "best baseline" if len(baselines) == 1 else f"best baseline, {key}"
            axes.axhline(100 * value, color=BASELINE, linestyle="--", label=label)
        mark_best(axes, best, study.trials[best].values[0])
        columns = 4 if width == WIDE else 2
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=columns, frameon=False, fontsize=9)
        return axes

    return optuna_svg("history", draw, 3.4)


def mark_best(axes: Any, x: float, y: float) -> None:
    """Draw a star at the trial that is named best."""
    axes.plot([x], [y], marker="*", markersize=13, color=PALETTE[8], linestyle="", label="best trial", zorder=5)


def importance_figure(shares: Mapping[str, float]) -> str:
    """Share of the objective's variance that each setting explains, largest first."""
    names = sorted(shares, key=lambda name: -shares[name])

    def draw(figure: Canvas) -> None:
        axes = figure.subplots()
        bars = axes.barh(range(len(names)), [shares[name] for name in names], color=PALETTE[0], height=0.6)
        axes.bar_label(bars, [f"{shares[name]:.0%}" for name in names], padding=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.1 * max(shares.values()))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of the objective's variance")

    return svg("importance", draw, (WIDE, 1.2 + 0.4 * len(names)))


def slice_figures(study: optuna.Study, space: Space, name: str) -> str:
    """Objective of every trial over its value of each setting, SLICES of them in a row."""

    def row(names: list[str], width: float) -> str:
        def draw(_: float) -> Any:
            drawn: Any = optuna_figures.plot_slice(study, names, target_name=name)
            drawn = np.ravel(drawn)
            drawn[0].figure.get_layout_engine().set(wspace=0.06)  # numbers at the ends of two axes must not touch
            for axes in drawn:
                axes.tick_params(axis="x", rotation=90)
            return drawn[0]

        return optuna_svg(f"slice-{names[0]}", draw, 3.9, (width,))

    return "".join(
        row(list(space)[n : n + columns], width)
        for columns, width in ((SLICES, WIDE), (1, NARROW))
        for n in range(0, len(space), columns)
    )


def pareto_figure(trials: Sequence[Trial], space: Space, second: str, name: str, best: Trial) -> str:
    """Objective against parameters or latency; red: trials that no other beats in both."""
    measured = [trial for trial in trials if getattr(trial, second) is not None]
    label = "parameters" if second == "parameters" else "milliseconds for one pair"

    def draw(_: float) -> Any:
        study = study_of(measured, space, second)
        axes = optuna_figures.plot_pareto_front(study, target_names=[name, label])
        if best in measured:
            mark_best(axes, *study.trials[measured.index(best)].values)
        if all(getattr(trial, second) > 0 for trial in measured):  # an adapter that is solved trains no parameters
            axes.set_yscale("log")
        return axes

    return optuna_svg("pareto", draw, 3.6)


def optuna_svg(
    name: str, draw: Callable[[float], Any], height: float, widths: Sequence[float] = (WIDE, NARROW)
) -> str:
    """SVG of the figures of the axes that `draw` makes with Optuna for a width, without their titles."""
    return "".join(_optuna_svg(f"{name}-{width:g}", draw, (width, height)) for width in widths)


def _optuna_svg(name: str, draw: Callable[[float], Any], size: tuple[float, float]) -> str:
    """SVG of one of them, in the colours of the page."""
    style = STYLE | {"svg.hashsalt": name, "figure.figsize": size, "figure.constrained_layout.use": True}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        plt.switch_backend("agg")
        figure = draw(size[0]).figure
        figure.set_size_inches(size)
        figure.suptitle("")
        for axes in figure.axes:
            axes.set_facecolor("none")
            for loc in ("left", "center"):
                axes.set_title("", loc=loc)
            axes.tick_params(colors=INK, labelsize=8)
            axes.xaxis.label.set_color(INK)
            axes.yaxis.label.set_color(INK)
            axes.grid(color=FAINT)
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":
                    axis.set_major_formatter("{x:g}")  # the default is mathematical markup
                    axis.set_minor_formatter(NullFormatter())
        figure.patch.set_facecolor("none")
        drawn = to_svg(figure, "wide" if size[0] == WIDE else "narrow")
        plt.close(figure)
    return drawn


def facts(folder: SweepDir, about: dict[str, Any], cfg: TuneConfig) -> Iterator[tuple[str, str]]:
    """Name and value of each fact of the sweep."""
    yield "searched", "\n".join(f"{name}: {value}" for name, value in cfg.space.items())
    yield "base", "\n".join(f"{name}: {value}" for name, value in cfg.base.items()) or "nothing"
    yield "objective", f"{cfg.objective} on the validation part, at the checkpoint of the lowest validation loss"
    yield "search algorithm, scheduler", f"{cfg.search_alg} (seed {cfg.seed}), {cfg.scheduler}"
    limits = {name: getattr(cfg, name) for name in ("max_trials", "max_hours", "max_gpu_hours")}
    limits = {
        name: duration_words(3600 * value) if "hours" in name else value for name, value in limits.items() if value
    }
    yield "budget", ", ".join(f"{name} {value}" for name, value in limits.items())
    yield "started", f"{sum(line['kind'] == 'run_started' for line in folder.entries())} times"
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


def draft_finals_table(finals: list[dict[str, Any]]) -> Table:
    """The winner's evaluations by tokens per target pass, one for each seed."""
    rows = []
    for line in finals:
        test = line["test"]
        (low, high), (least, most) = (test["interval95"][name] for name in (TOKENS, "gain"))
        cells: list[str | Cell] = [
            f"{test[TOKENS]:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{test['best_baseline']}, {test['baselines'][test['best_baseline']]:.2f}",
            Cell(f"{test['gain']:+.2f}", "good" if test["gain"] > 0 else "bad"),
            f"{least:+.2f} to {most:+.2f}",
            f"{test['cos_sim_mean']:.3f}",
        ]
        rows.append(Row(str(line["seed"]), cells))
    return Table(
        ["seed", "tokens per target pass", "95 %", "best baseline", "gain over it", "95 % of the gain", "cosine"],
        rows,
        "The best setting, trained again on training and validation parts and evaluated on the test pairs, once for "
        "each seed. Intervals are over sequences. Baselines: no drafter, the mean image tokens, another drive's "
        "events.",
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


def trials_block(folder: SweepDir, trials: list[Trial], *, drafting: bool) -> Table:
    """Every trial, the best first, with a link to its checkpoint if it is kept."""
    rows, best = [], best_of(trials)
    for trial in ranked(trials):
        shown = {head: Cell(text) for head, text in trial_cells(trial, drafting=drafting).items()}
        if trial.lift is not None:
            shown[LIFT_HEAD] = trial_lift_cell(trial.lift)
        name, *cells = shown.values()
        named = Cell(
            name.text, href=folder.kept_checkpoint(trial.name) or "", quiet="the best" if trial is best else ""
        )
        rows.append(Row(named, cells, "adapter" if trial is best else ""))
    lift = "" if drafting else " Lift is over the best baseline, in percentage points."
    return Table(
        list(trial_heads(drafting=drafting)),
        rows,
        f"At the checkpoint of the lowest validation loss.{lift}",
        wrapped="setting",
    )
