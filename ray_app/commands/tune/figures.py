"""Figures of a sweep's page, as inline SVG: how the best grew, what was tried, what mattered, what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ray_app.commands.tune.spec import Choice, Dimension, Space, shown_value
from ray_app.commands.tune.sweep_dir import Trial
from ray_app.reports.figures import FAINT, INK, PALETTE, log_scale, svg

CONTROL = PALETTE[3]
"""Colour of the best baseline."""
MARKS = {"finished": "o", "stopped": "v", "running": "s", "waiting": "s"}
"""Of trials, by how they stand."""
LINE = 0.08
"""Height of a line of words beside an axis of `parallel_figure`."""
CROWDED = 5
"""Settings from which on their names stand in two rows."""


@dataclass(frozen=True, slots=True)
class Point:
    """One epoch of one trial."""

    hours: float
    """Of search, without pauses between starts."""
    petaflops: float
    """Training compute of all trials until then: 6 · parameters · pairs."""
    objective: float
    """Of the trial's best checkpoint so far."""


def growth_figure(points: Sequence[Point], baselines: Mapping[str, float], name: str) -> str:
    """The best objective so far over time and over compute."""
    best = np.maximum.accumulate([point.objective for point in points])

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, unit in ((left, "hours"), (right, "petaflops")):
            at = [getattr(point, unit) for point in points]
            axes.scatter(at, [point.objective for point in points], s=9, color=PALETTE[1], alpha=0.7, linewidth=0)
            axes.step(at, best, where="post", color=PALETTE[0], linewidth=2.4, label="best so far")
            baseline_lines(axes, baselines, labelled=axes is right)
            axes.set_xlim(left=0)
            axes.locator_params(axis="x", nbins=4)  # of a short search the numbers are long
        left.set_xlabel("hours of search")
        right.set_xlabel("training compute of all trials, PFLOP")
        left.set_ylabel(name)
        left.yaxis.set_major_formatter(PercentFormatter(1.0))

    return svg("growth", draw, (8.2, 3.4))


def baseline_lines(axes: Axes, baselines: Mapping[str, float], *, labelled: bool = True) -> None:
    """A line for the best baseline of each data set."""
    for key, value in baselines.items():
        axes.axhline(value, color=CONTROL, linewidth=1.4, linestyle="--")
        if labelled:
            told = "best baseline" if len(baselines) == 1 else f"best baseline, {key}"
            side = axes.get_yaxis_transform()
            beside(axes, told, (1, value), (-3, 3), xycoords=side, ha="right", color=CONTROL, fontsize=9)


def beside(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """A text so many points away from a place."""
    axes.annotate(text, place, offset, textcoords="offset points", **({"fontsize": 8.5} | style))


def parallel_figure(trials: Sequence[Trial], space: Space, baselines: Mapping[str, float], name: str) -> str:
    """Parallel coordinates: a line a trial, through its settings to its objective."""
    judged = sorted((t for t in trials if t.objective is not None), key=lambda t: t.objective or 0.0)
    objectives = np.array([t.objective for t in judged])
    low, high = min(objectives.min(), *baselines.values()), max(objectives.max(), *baselines.values())
    span = (high - low) or 1.0
    colours = matplotlib.colormaps["viridis"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for trial, objective in zip(judged, objectives, strict=True):
            heights = [height(space[key], trial.setting[key]) for key in space]
            shade = to_hex(colours(0.92 * (objective - objectives.min()) / (np.ptp(objectives) or 1.0)))
            best = trial is judged[-1]
            axes.plot(
                [*range(len(space)), len(space)], [*heights, (objective - low) / span], color=shade,
                linewidth=2.8 if best else 1.1, alpha=1.0 if best else 0.75, solid_joinstyle="round",
            )  # fmt: skip
        for x, dimension in enumerate(space.values()):
            axes.axvline(x, color=INK, linewidth=0.8)
            for y, text in ticks(dimension):
                beside(axes, text, (x, y), (4, 0), va="center")
        x = len(space)
        axes.axvline(x, color=INK, linewidth=0.8)
        for y, value in ((0.0, low), (1.0, high)):
            beside(axes, f"{100 * value:.1f} %", (x, y), (4, 0), va="center")
        for n, title in enumerate([*space, name]):  # in two rows where they are many
            beside(axes, title, (n, 1), (0, 22 if x >= CROWDED and n % 2 else 10), ha="center", fontsize=9.5)
        heights = [(value - low) / span for value in baselines.values()]
        for key, y, beside_y in zip(baselines, heights, spread(heights), strict=True):
            axes.plot([x - 0.25, x + 0.06], [y, y], color=CONTROL, linewidth=2, linestyle="--")
            told = "best baseline" if len(baselines) == 1 else f"best baseline, {key}"
            beside(axes, told, (x, beside_y), (8, 0), va="center", color=CONTROL, fontsize=9)
        axes.set_xlim(-0.15, x + 0.1)
        axes.set_ylim(-0.05, 1.05)
        axes.axis("off")

    return svg("parallel", draw, (8.2, 3.6))


def spread(heights: Sequence[float]) -> list[float]:
    """Heights for a line of words beside each of these, apart from one another and from the axis's ends."""
    gap = min(LINE, (1.0 - LINE) / len(heights))
    placed = [0.0] * len(heights)
    below = 0.0
    for rank, n in enumerate(np.argsort(heights, kind="stable")):
        above = 1.0 - gap * (len(heights) - rank)
        below = placed[n] = min(max(heights[n], below + gap), above)
    return placed


def height(dimension: Dimension, value: Any) -> float:
    """Where a value lies on its axis, 0 to 1."""
    if isinstance(dimension, Choice):
        return (dimension.values.index(value) + 0.5) / len(dimension.values)
    if dimension.log:
        return float(np.log(value / dimension.low) / np.log(dimension.high / dimension.low))
    return float((value - dimension.low) / (dimension.high - dimension.low))


def ticks(dimension: Dimension) -> list[tuple[float, str]]:
    """(height, text) of the marks of an axis."""
    return [(height(dimension, value), shown_value(value)) for value in dimension.bounds]


def importance_figure(
    shares: Mapping[str, float], trials: Sequence[Trial], space: Space, baselines: Mapping[str, float], name: str
) -> str:
    """How much of the objective's variance each setting explains, and every trial over the values of each."""
    names = sorted(shares, key=shares.__getitem__)
    judged = [trial for trial in trials if trial.objective is not None]
    columns = min(len(names), 3)
    rows = -(-len(names) // columns)

    def draw(figure: Figure) -> None:
        parts: Any = figure.subfigures(2, 1, height_ratios=(0.7 + 0.34 * len(names), 2.2 * rows))
        above, below = parts
        axes = above.subplots()
        axes.barh(names, [shares[key] for key in names], color=PALETTE[0], height=0.6)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlim(0, 1)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("share of the objective's variance")
        panels = list(below.subplots(rows, columns, sharey=True, squeeze=False).flat)
        for panel, key in zip(panels, names[::-1], strict=False):
            values_of(panel, judged, key, space[key])
            baseline_lines(panel, baselines, labelled=key == names[-1])
        for panel in panels[len(names) :]:
            panel.axis("off")
        below.supylabel(name, fontsize=10)

    return svg("importance", draw, (8.2, 0.9 + 0.38 * len(names) + 2.2 * rows))


def values_of(axes: Axes, trials: Sequence[Trial], key: str, dimension: Dimension) -> None:
    """The objective of every trial over its value of one setting."""
    at = [height(dimension, trial.setting[key]) for trial in trials]
    axes.scatter(at, [trial.objective or 0.0 for trial in trials], s=16, color=PALETTE[0], alpha=0.8, linewidth=0)
    places, texts = zip(*ticks(dimension), strict=True)
    axes.set_xticks(places, texts, fontsize=8)
    axes.set_xlim(-0.05, 1.05)
    axes.set_xlabel(key)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def cost_figure(
    trials: Sequence[Trial], best: Sequence[Trial], second: str, baselines: Mapping[str, float], name: str
) -> str:
    """The objective against parameters or latency, with the front of those that none beats in both."""
    judged = [t for t in trials if t.objective is not None and getattr(t, second) is not None]

    def height_of(trial: Trial) -> float:
        return trial.objective or 0.0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for status in dict.fromkeys(trial.status for trial in judged):
            of = [trial for trial in judged if trial.status == status]
            axes.scatter(
                [getattr(t, second) for t in of], [height_of(t) for t in of], marker=MARKS.get(status, "x"), s=34,
                facecolor=FAINT if status != "finished" else PALETTE[0], edgecolor=PALETTE[0], label=status,
            )  # fmt: skip
        axes.plot([getattr(t, second) for t in best], [height_of(t) for t in best], color=PALETTE[5], label="front")
        baseline_lines(axes, baselines)
        log_scale(axes, [getattr(t, second) for t in judged])
        axes.set_xlabel("parameters" if second == "parameters" else "milliseconds for one pair")
        axes.set_ylabel(name)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.legend(loc="outside right upper", frameon=False)

    return svg("cost", draw, (8.2, 3.4))
