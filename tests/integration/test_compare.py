"""Several checkpoints side by side, by the one evaluator."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import assert_has_words, assert_light_and_dark, assert_opens, assert_self_contained
from small_runs import make_run

from ray_app import cli
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.commands.evaluate.compare import compare_checkpoints, cost_figure
from ray_app.config.evaluate import CompareConfig, EvaluateConfig
from ray_app.errors import StoreError

PICTURES = 4
"""Windows of the one drive of the test part."""


@contextmanager
def as_standard_output(file: int) -> Iterator[None]:
    """The command writes to the descriptor itself, and pytest captures that for single tests alone."""
    kept = os.dup(1)
    os.dup2(file, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.fixture(scope="module")
def compared(
    ray_cluster: None,  # noqa: ARG001
    small_store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Path], Path, dict[str, Any]]:
    """Two runs, the folder of their comparison, and what it said."""
    root = tmp_path_factory.mktemp("compare")
    runs = [make_run(small_store, root / name, steps=steps) for name, steps in (("a", 40), ("b", 0))]
    words = ["compare", *map(str, runs), "--store", str(small_store), "--out", str(root / "out"), "--json"]
    with (root / "said.json").open("w") as said, as_standard_output(said.fileno()):
        assert cli.run(words) == 0
    return runs, root / "out", json.loads((root / "said.json").read_text())


def test_checkpoints_get_the_numbers_of_evaluate_and_one_page(
    compared: tuple[list[Path], Path, dict[str, Any]], small_store: Path, tmp_path: Path
) -> None:
    runs, out, result = compared
    assert set(result["adapters"]) == {"bottleneck (a)", "bottleneck (b)"}
    alone = run_evaluate(EvaluateConfig(store=str(small_store), checkpoint=str(runs[0]), out=tmp_path / "alone"))
    metrics: dict[str, Any] = result["adapters"]["bottleneck (a)"]
    for key in ("cosine_accept_rate", "lift", "interval95", "by_sequence", "by_lighting", "retrieval"):
        assert metrics[key] == alone[key]
    assert metrics["parameters"] == 768 * 16 + 16 + 32 + 16 * 768 + 768
    assert 0 < metrics["latency_ms"] < 1000
    assert result["verdict"].startswith("bottleneck (a) ")
    page = (out / "comparison.html").read_text()
    assert_self_contained(page)
    assert_light_and_dark(page)
    assert_has_words(page)
    for word in ("bottleneck (a)", "bottleneck (b)", "mean_target", "R@1/5/10", "What acceptance costs"):
        assert word in page
    assert page.count("<img") == PICTURES * (2 + 2)
    assert json.loads((out / "comparison.json").read_text())["adapters"] == result["adapters"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        compare_checkpoints(CompareConfig(checkpoints=(str(runs[0]),), store=str(small_store), out=out))


def test_the_page_opens_without_a_network_wide_and_narrow(compared: tuple[list[Path], Path, dict[str, Any]]) -> None:
    assert_opens(compared[1] / "comparison.html")


@pytest.mark.slow
def test_no_two_words_of_the_picture_touch_however_near_or_far_apart_the_adapters_are(tmp_path: Path) -> None:
    def point(parameters: int, latency_ms: float) -> dict[str, Any]:
        return {
            "parameters": parameters,
            "latency_ms": latency_ms,
            "cosine_accept_rate": {"0.80": 0.5},
            "lift": -latency_ms,
        }

    apart = [1 + 10.0**n for n in np.linspace(-4, 4, 17)]
    figures = [
        cost_figure(
            {
                "baselines": {"mean_target": {"cosine_accept_rate": {"0.80": 0.4}}},
                "adapters": {
                    "a": point(solved, 0.0123),
                    "b": point(25_600, 0.0123 * by),
                    "c": point(int(25_600 * by), 1),
                },
            }
        )
        for by in apart
        for solved in (0, 25_600)
    ]
    (tmp_path / "figures.html").write_text("".join(f"<div>{figure}</div>" for figure in figures))
    assert_opens(tmp_path / "figures.html")
