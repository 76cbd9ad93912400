"""The benchmarks of proxies and of texts on a tiny target, and their numbers on trials of a known order."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import tiny_target
import torch

from benchmarks import figures
from benchmarks.speculative import event_proxies, event_texts
from benchmarks.speculative.event_drafter import SEED, Part
from benchmarks.speculative.event_proxies import COLUMNS, PROXIES
from benchmarks.tables import event_proxies as tables
from ray_app.commands.demo.draft_training import TEST, TRAIN, DraftRecipe, FrozenDrafter, write_draft_stores
from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.evaluation import AlignmentEvaluator, TrainingMeans
from ray_app.core.metrics import rate_key
from ray_app.language_models.draft_rows import unpack
from ray_app.language_models.kinds import load
from ray_app.reports.figures import STYLE
from ray_app.runs.run_dir import RunDir
from ray_app.store.checkpoint import load_checkpoint

RECIPE = DraftRecipe(
    drives=12, per_drive=2, exit_layers=1, exit_rank=2, exit_epochs=1, event_rank=8, event_epochs=1, batch_size=4
)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_proxies, "RESAMPLES", 20)


@pytest.mark.slow
def test_proxies_and_texts_are_measured_and_a_repeated_command_measures_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, work = tiny_target.save_target(tmp_path), tmp_path / "work"
    saved: dict[str, list[dict[str, Any]]] = {}
    for module in (event_proxies, event_texts):
        monkeypatch.setattr(module, "RECIPE", RECIPE)
        monkeypatch.setattr(module, "save", lambda name, result: saved.setdefault(name, []).append(result))
    monkeypatch.setattr(event_proxies, "TRIALS", 3)
    monkeypatch.setattr(event_texts, "SEEDS", 1)
    write_draft_stores(load(target, "float32", "cpu"), work, RECIPE, 3, SEED, print)
    monkeypatch.setattr("sys.argv", ["command", str(target), "--work", str(work)])
    for _ in range(2):
        event_texts.main()  # trains the drafter of `event_drafter` too
        event_proxies.main()
    for name in ("event_proxies", "event_texts"):
        assert json.dumps(saved[name][0], allow_nan=False) == json.dumps(saved[name][1])
    assert len(saved["event_proxies"][0]["trials"]) == 3

    monkeypatch.setattr(tables, "read", lambda name: saved[name][0])
    assert len(tables.event_proxies().rows) == len(PROXIES) + 1
    assert len(tables.event_texts().rows) == len(tables.TEXTS) + len(event_texts.DIFFERENCES)

    # a trial's numbers are those of the evaluation and of the drafter's own count
    best = RunDir(work / "seed_0" / "exit").best()
    assert best is not None
    drafter = load_checkpoint(best).adapter
    assert isinstance(drafter, EarlyExitLayers)
    train, test = Part.of(work / TRAIN), Part.of(work / TEST)
    frozen = FrozenDrafter(drafter, target / "language_model", test.layout)
    trial = RunDir(work / "proxies" / "trial_02").best()
    assert trial is not None
    adapter, found = load_checkpoint(trial).adapter, saved["event_proxies"][0]["trials"][2]
    with torch.no_grad():
        drafted = frozen.along(test.rows_NT, adapter(test.event_NE.float()))
    assert found["tokens_per_target_pass"] == pytest.approx(drafted.tokens_N.sum() / drafted.passes_N.sum())
    width = test.layout.width
    mean_X = TrainingMeans.of(train.image_NX.numpy(), width).mean_target(1.0)
    evaluator = AlignmentEvaluator(adapter.eval(), mean_X, 1.0, 1.0, token_width=width)
    evaluator.add(test.event_NE, test.image_NX)
    drives = test.store.index.sequence.tolist()
    metrics = evaluator.result(drives, np.full(len(drives), -1)).metrics()
    assert found["cosine"] == pytest.approx(metrics["cos_sim_mean"], rel=1e-4)
    assert found["centred_cosine"] == pytest.approx(metrics["centered_cos_sim_mean"], abs=1e-4)
    assert found["R@1"] == pytest.approx(metrics["retrieval"]["R@1"])
    for name, theta in event_proxies.ACCEPTED.items():
        assert found[name] == metrics["cosine_accept_rate"][rate_key(theta)]

    # captions have a row for each picture, and the drafter of `event_drafter` is one of the arms
    texts, frame = saved["event_texts"][0], frozen.along(test.rows_NT, test.image_NX)
    of_kl = texts["tokens_per_target_pass"][event_texts.KL]["mean"]
    assert of_kl == pytest.approx(frame.tokens_N.sum() / frame.passes_N.sum())
    captions = Part.of(work / event_texts.CAPTIONS)
    assert torch.equal(captions.image_NX, train.image_NX)
    rows = unpack(captions.layout, captions.rows_NT.float())
    said = torch.tensor(captions.layout.vocabulary)[rows.p_BLI.argmax(dim=2)]
    assert torch.equal(said[rows.used_BL], rows.ids_BL[rows.used_BL])
    layout, wide_NT = event_texts.widened(test, captions.layout.vocabulary)
    wide, own = unpack(layout, wide_NT.float()), unpack(test.layout, test.rows_NT.float())
    assert torch.equal(wide.ids_BL, own.ids_BL)
    kept = [layout.vocabulary.index(token) for token in test.layout.vocabulary]
    assert torch.allclose(wide.p_BLI[:, :, kept], own.p_BLI)


def sums(**columns: list[float]) -> np.ndarray:
    """Sums of trials over six drives, all alike, (T, U, C)."""
    found = np.ones((len(columns["passes"]), 6, len(COLUMNS)))
    for name, values in columns.items():
        found[:, :, COLUMNS.index(name)] = np.array(values)[:, None]
    return found


def test_a_proxy_that_is_the_same_for_all_trials_has_no_rank() -> None:
    passes = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0]  # tokens rise from trial to trial
    found = event_proxies.correlations(
        sums(passes=passes, cosine=[1, 2, 3, 4, 5, 6], kl=[6, 5, 4, 3, 2, 1]), half=False
    )
    assert set(found) == set(PROXIES)
    assert found["cosine"]["rho"] == pytest.approx(1.0)
    assert found["cosine"]["interval95"][0] == pytest.approx(1.0)
    assert found["kl"]["rho"] == pytest.approx(-1.0)
    assert found["R@1"] == {"rho": None, "interval95": None}


def test_the_better_half_has_an_order_of_its_own() -> None:
    columns = sums(passes=[8.0, 7.0, 6.0, 5.0, 4.0, 3.0], cosine=[1, 2, 3, 6, 5, 4])
    assert event_proxies.correlations(columns, half=True)["cosine"]["rho"] == pytest.approx(-1.0)
    assert event_proxies.correlations(columns, half=False)["cosine"]["rho"] == pytest.approx(1 - 6 * 8 / (6 * 35))


def test_the_figure_has_a_panel_for_each_proxy_and_a_point_for_each_trial() -> None:
    trials = list(event_proxies.drawn_trials(12, 64))
    rng = np.random.default_rng(0)
    columns_TNC = rng.uniform(1.0, 2.0, (12, 8, len(COLUMNS)))
    columns_TNC[:, :, COLUMNS.index("cosine_accept_rate_0.80")] = columns_TNC[:, :, COLUMNS.index("pictures")]
    result = event_proxies.numbers(trials, columns_TNC, [f"drive {n // 2}" for n in range(8)])
    assert set(PROXIES) == set(tables.PROXIES)
    with matplotlib.rc_context(STYLE):
        figure = figures.event_proxies(result)
        root = ElementTree.fromstring(figures.svg_file(figure))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "all the same"
    assert len(titles) == len(PROXIES)
    assert sum(len(points.get_offsets()) for axes in figure.axes for points in axes.collections) == 12 * len(PROXIES)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "#0a0b" not in ElementTree.tostring(root, encoding="unicode"), "a placeholder of a colour"


def test_trials_are_drawn_within_their_ends_and_fewer_are_the_first_of_more() -> None:
    trials = list(event_proxies.drawn_trials(event_proxies.TRIALS, 64))
    assert len(trials) >= 24
    assert {loss for each in trials for loss in each.losses} == set(event_proxies.LOSSES)
    assert {len(each.losses) for each in trials} == {1, 2}
    for each in trials:
        assert 4 <= each.rank <= 64
        assert 1e-4 <= each.learning_rate <= 5e-3
        assert 1 <= each.epochs <= 4
    assert {each.epochs for each in trials} == {1, 2, 3, 4}
    assert list(event_proxies.drawn_trials(5, 64)) == trials[:5]
