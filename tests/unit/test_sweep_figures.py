"""Figures of a sweep's page: no two words of them touch, whatever was tried."""

from pathlib import Path

import pytest
from pages import assert_opens

from ray_app.commands.tune.figures import LINE, Point, growth_figure, parallel_figure, spread
from ray_app.commands.tune.spec import Choice, Range, Space
from ray_app.commands.tune.sweep_dir import Trial

SPACE: Space = {
    "hidden_dim": Choice((64, 128, 256, 512)),
    "mse_weight": Range(0.1, 30.0, log=True, step=None, integer=False),
    "contrastive_weight": Range(0.03, 3.0, log=True, step=None, integer=False),
    "learning_rate": Range(1e-4, 3e-3, log=True, step=None, integer=False),
    "weight_decay": Range(1e-4, 0.3, log=True, step=None, integer=False),
    "dropout": Range(0.0, 0.4, log=False, step=0.1, integer=False),
    "accept_weight": Choice((0.0, 0.1, 0.5)),
    "cosine_weight": Range(0.03, 3.0, log=True, step=None, integer=False),
}


def figure(settings: int, best: float, baselines: dict[str, float]) -> str:
    """Two trials in a space of so many settings."""
    space = dict(list(SPACE.items())[:settings])
    first = {name: dimension.bounds[0] for name, dimension in space.items()}
    last = {name: dimension.bounds[-1] for name, dimension in space.items()}
    trials = [Trial(0, "a", first, 1, objective=0.0), Trial(1, "b", last, 1, objective=best)]
    return parallel_figure(trials, space, baselines, "accepted at 0.80")


def test_no_two_words_touch_wherever_the_baseline_lies(tmp_path: Path) -> None:
    baselines = [{"all": value} for value in (0.0, 0.02, 0.5, 0.639, 0.62, 1.0)]
    several = {"1s": 0.639, "2s": 0.639, "4s": 0.63}
    figures = [figure(6, 0.639, told) for told in (*baselines, several)]
    figures += [figure(settings, 0.639, {"all": 0.639}) for settings in (1, 4, 5, 7, 8)]
    (tmp_path / "figures.html").write_text("".join(f"<div>{each}</div>" for each in figures))
    assert_opens(tmp_path / "figures.html")


def test_no_two_words_touch_however_long_it_took(tmp_path: Path) -> None:
    spans = [factor * 10.0**power for power in range(-5, 2) for factor in (1.0, 1.68, 1.85, 2.4, 3.4, 3.7, 7.2)]
    figures = [
        growth_figure([Point(0.1 * span, 0.2, 0.5), Point(span, 1.1, 0.6)], {"all": 0.55}, "accepted at 0.80")
        for span in spans
    ]
    (tmp_path / "figures.html").write_text("".join(f"<div>{each}</div>" for each in figures))
    assert_opens(tmp_path / "figures.html")


@pytest.mark.parametrize("heights", [[1.0], [0.0], [0.5, 0.5, 0.5], [1.0, 0.99, 0.0], [0.3] * 30])
def test_words_beside_an_axis_keep_their_order_and_a_line_apart(heights: list[float]) -> None:
    found = spread(heights)
    assert [h for _, h in sorted(zip(heights, found, strict=True))] == sorted(found)
    gaps = [b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)]
    assert all(gap >= min(LINE, 0.9 / len(heights)) - 1e-9 for gap in gaps)
    assert all(min(LINE, 0.9 / len(heights)) - 1e-9 <= h <= 1 - min(LINE, 0.9 / len(heights)) + 1e-9 for h in found)
