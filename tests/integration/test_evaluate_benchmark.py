"""The whole store through a checkpoint: the reference's keys, the parts kept apart, the adapter timed."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small_runs import keys, make_run

from ray_app.commands.evaluate import benchmark
from ray_app.commands.evaluate.benchmark import render_benchmark, run_benchmark
from ray_app.commands.evaluate.command import run_evaluate
from ray_app.config.base import SplitConfig
from ray_app.config.evaluate import BenchmarkConfig, EvaluateConfig
from ray_app.store.pair_store import PairStore
from ray_app.store.split import split_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def run(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(small_store, tmp_path_factory.mktemp("runs") / "run", steps=30)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def result(
    small_store: Path,
    run: Path,
    out: Path,
    ray_cluster: None,  # noqa: ARG001
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "RUN_PAIRS", 30)
        return run_benchmark(BenchmarkConfig(store=small_store, checkpoint=str(run), out=out, batch_size=8))


@pytest.fixture(scope="module")
def document(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    assert result["files"] == [str(out / "benchmark_adapter_full_S1.json")]
    return json.loads((out / "benchmark_adapter_full_S1.json").read_text())


def test_the_file_has_the_references_keys_and_units(
    shared_reference: Path, document: dict[str, Any], result: dict[str, Any]
) -> None:
    theirs = json.loads((shared_reference / "benchmark_adapter_full_S1.json").read_text())
    assert keys(theirs) <= keys(document)
    assert list(document)[: len(theirs)] == list(theirs)
    for block in ("before_adapter", "after_adapter", "percentiles_after", "improvement"):
        assert list(document[block]) == list(theirs[block])
    assert document["after_adapter"]["acceptance_at_0.8"] == 100 * result["cosine_accept_rate"]["0.80"]
    assert document["acceptance_threshold"] == theirs["acceptance_threshold"]


def test_parts_tell_training_data_from_the_rest_and_add_up(small_store: Path, document: dict[str, Any]) -> None:
    split = split_pairs(PairStore.open(small_store).index, SplitConfig())
    parts = document["parts"]
    assert {name: part["pairs"] for name, part in parts.items()} == {
        "train": len(split.train),
        "val": len(split.val),
        "test": len(split.test),
    }
    assert [name for name, part in parts.items() if part["training_data"]] == ["train", "val"]
    accepted = sum(part["pairs"] * part["after_adapter"]["acceptance_at_0.8"] for part in parts.values())
    assert accepted / document["total_samples"] == pytest.approx(document["after_adapter"]["acceptance_at_0.8"])
    assert all(set(part["baselines"]) >= {"before", "white", "mean_target", "shuffled"} for part in parts.values())


def test_the_test_part_has_the_numbers_of_evaluate(
    small_store: Path, run: Path, tmp_path: Path, result: dict[str, Any]
) -> None:
    evaluated = run_evaluate(EvaluateConfig(store=small_store, checkpoint=str(run), out=tmp_path))
    part = result["parts"]["test"]
    assert part["cos_sim_mean"] == pytest.approx(evaluated["cos_sim_mean"], abs=1e-6)
    assert part["cosine_accept_rate"] == evaluated["cosine_accept_rate"]
    for name in ("before", "white", "mean_target"):
        assert part["baselines"][name]["cos_sim_mean"] == pytest.approx(
            evaluated["baselines"][name]["cos_sim_mean"], abs=1e-6
        )


def test_samples_are_the_first_pairs_in_canonical_order(small_store: Path, document: dict[str, Any]) -> None:
    index = PairStore.open(small_store).index
    samples = document["sample_results"]
    assert len(samples) == min(100, len(index))
    assert [sample["id"] for sample in samples] == index.sample_id[: len(samples)].tolist()
    assert all(sample["accepted_at_0.8"] == (sample["cos_sim_after"] > 0.8) for sample in samples)
    mean = np.mean([sample["cos_sim_after"] for sample in samples])
    assert mean == pytest.approx(document["after_adapter"]["mean_cosine_similarity"], abs=1e-6)


def test_every_batch_is_timed_once_and_the_warm_up_is_not(document: dict[str, Any]) -> None:
    timing = document["timing"]
    assert timing["batches"] == sum(-(-pairs // 8) for pairs in (24, 24, 24))
    assert timing["total_adapter_time"] == pytest.approx(timing["avg_adapter_time_per_batch"] * timing["batches"])
    assert timing["samples_per_second"] == pytest.approx(document["total_samples"] / timing["total_adapter_time"])


def test_the_printed_tables_name_the_training_data(result: dict[str, Any]) -> None:
    out = io.StringIO()
    render_benchmark(result, Console(width=140, file=out))
    assert re.search(r"train +│ yes", out.getvalue())
    assert re.search(r"test +│ no", out.getvalue())
    assert "pairs/s" in out.getvalue()
