"""Figures of a sweep's page: drawn by Optuna from a study of the recorded trials, as inline SVG."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial
from optuna.visualization import matplotlib as optuna_figures

from ray_app.commands.tune.searchers import distribution
from ray_app.commands.tune.spec import Choice, Space, shown_value
from ray_app.commands.tune.sweep_dir import Trial
from ray_app.reports.figures import FAINT, INK, PALETTE, STYLE, to_svg

BASELINE = PALETTE[3]
"""Colour of the best baseline."""
SLICES = 3
"""Settings in a row of `slice_figures`."""


def study_of(trials: Sequence[Trial], space: Space, second: str | None = None) -> optuna.Study:
    """Study of the trials with an objective, in percent. `second`: an attribute of Trial that is minimised too."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        name: CategoricalDistribution([scalar(value) for value in dimension.values])
        if isinstance(dimension, Choice)
        else distribution(dimension)
        for name, dimension in space.items()
    }
    study = optuna.create_study(directions=["maximize", "minimize"] if second else ["maximize"])
    for trial in trials:
        cost: Any = getattr(trial, second) if second else None
        if trial.objective is None or (second and cost is None):
            continue
        values = [100 * trial.objective, *([cost] if second else [])]
        params = {name: scalar(trial.setting[name]) for name in space}
        study.add_trial(create_trial(params=params, distributions=distributions, values=values))
    return study


def scalar(value: Any) -> Any:
    """Value of a setting as Optuna takes it: a list becomes its text."""
    return value if isinstance(value, bool | int | float | str) else shown_value(value)


def optuna_svg(
    name: str, draw: Callable[[], Any], size: tuple[float, float], finish: Callable[[Figure], None] | None = None
) -> str:
    """SVG of the figure that `draw` makes with Optuna and `finish` completes, in the colours of the page."""
    style = STYLE | {"svg.hashsalt": name, "figure.figsize": size, "figure.constrained_layout.use": True}
    with warnings.catch_warnings(), matplotlib.rc_context(style):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        plt.switch_backend("agg")
        figure = np.ravel(draw())[0].figure
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
        if finish:
            finish(figure)
        figure.patch.set_facecolor("none")
        svg = to_svg(figure)
        plt.close(figure)
    return svg


def history_figure(trials: Sequence[Trial], space: Space, baselines: Mapping[str, float], name: str) -> str:
    """Objective of each trial and the best so far, with the best baselines (as fractions)."""
    study = study_of(trials, space)

    def finish(figure: Figure) -> None:
        axes = figure.axes[0]
        for key, value in baselines.items():
            label = "best baseline" if len(baselines) == 1 else f"best baseline, {key}"
            axes.axhline(100 * value, color=BASELINE, linestyle="--", label=label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.02), ncols=4, frameon=False, fontsize=9)

    return optuna_svg(
        "history", lambda: optuna_figures.plot_optimization_history(study, target_name=name), (8.2, 3.4), finish
    )


def parallel_figure(trials: Sequence[Trial], space: Space, name: str) -> str:
    """Parallel coordinates: a line for each trial, from its objective through its settings."""
    study = study_of(trials, space)

    def finish(figure: Figure) -> None:
        figure.axes[0].tick_params(axis="x", rotation=90)
        for axes in figure.axes:
            axes.grid(visible=False)

    return optuna_svg(
        "parallel",
        lambda: optuna_figures.plot_parallel_coordinate(study, params=list(space), target_name=name),
        (8.2, 4.6),
        finish,
    )


def importance_figure(trials: Sequence[Trial], space: Space, names: Sequence[str], seed: int, name: str) -> str:
    """Share of the objective's variance that each of some settings explains (fANOVA)."""
    study = study_of(trials, space)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)

    def draw() -> Any:
        return optuna_figures.plot_param_importances(study, evaluator, list(names), target_name=name)

    def finish(figure: Figure) -> None:
        if legend := figure.axes[0].get_legend():
            legend.remove()

    return optuna_svg("importance", draw, (8.2, 1.2 + 0.4 * len(names)), finish)


def slice_figures(trials: Sequence[Trial], space: Space, name: str) -> str:
    """Objective of every trial over its value of each setting, SLICES of them in a row."""
    study = study_of(trials, space)

    def finish(figure: Figure) -> None:
        engine: Any = figure.get_layout_engine()
        engine.set(wspace=0.06)  # numbers at the ends of two axes must not touch
        for axes in figure.axes:
            axes.tick_params(axis="x", rotation=90)

    rows = [list(space)[n : n + SLICES] for n in range(0, len(space), SLICES)]
    return "".join(
        optuna_svg(
            f"slice{n}",
            lambda row=row: optuna_figures.plot_slice(study, row, target_name=name),  # type: ignore[misc]
            (8.2, 3.2),
            finish,
        )
        for n, row in enumerate(rows)
    )


def pareto_figure(trials: Sequence[Trial], space: Space, second: str, name: str) -> str:
    """Objective against parameters or latency; red: trials that no other beats in both."""
    study = study_of(trials, space, second)
    label = "parameters" if second == "parameters" else "milliseconds for one pair"
    smallest = min((getattr(trial, second) or 0.0 for trial in trials), default=0.0)

    def finish(figure: Figure) -> None:
        if smallest > 0:  # an adapter that is solved trains no parameters
            figure.axes[0].set_yscale("log")
            figure.axes[0].yaxis.set_major_formatter("{x:g}")
            figure.axes[0].yaxis.set_minor_formatter(NullFormatter())

    return optuna_svg(
        "pareto", lambda: optuna_figures.plot_pareto_front(study, target_names=[name, label]), (8.2, 3.6), finish
    )
