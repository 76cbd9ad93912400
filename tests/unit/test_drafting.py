"""Drafters of a target that sees: their rows, their network, and what training of them changes."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_target
import torch
from small_drafting import decoded, rows_in
from transformers import AutoModelForCausalLM

from benchmarks.speculative.event_drafter import replay
from benchmarks.speculative.event_hybrid import WithDrafter
from ray_app.commands.demo import draft_data
from ray_app.commands.demo.answers import TRAINING, pictures
from ray_app.commands.demo.draft_data import answered_chunks, ids_of, subspace, write_draft_store
from ray_app.commands.demo.draft_training import (
    TRAIN,
    DraftRecipe,
    FrozenDrafter,
    event_settings,
    exit_settings,
    write_draft_stores,
)
from ray_app.commands.demo.sight import MAX_NEW_TOKENS
from ray_app.commands.demo.target import demo_encoder
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, validate
from ray_app.commands.train.state import resume_or_init
from ray_app.core.adapters.drafting import EarlyExitLayers
from ray_app.core.optimizer_step import training_step
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.data.pair_tensors import PairTensors
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.errors import ConfigError, InputError
from ray_app.language_models.answers import answer
from ray_app.language_models.draft_objective import DraftObjective
from ray_app.language_models.draft_rows import DraftLayout, pack, unpack
from ray_app.language_models.drafting import ModelProposer, ProductProposer
from ray_app.language_models.exit_network import ExitModel
from ray_app.language_models.kinds import load
from ray_app.language_models.lora import merge_changes
from ray_app.language_models.model import LanguageModel
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.checkpoint import save_checkpoint
from ray_app.store.pair_store import PairStore

CPU = torch.device("cpu")
DRIVES, PER_DRIVE = 4, 2
RECIPE = DraftRecipe(drives=DRIVES, per_drive=PER_DRIVE, exit_layers=1, exit_rank=2, event_rank=3, batch_size=4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(tiny_target.save_target(tmp_path_factory.mktemp("models")), "float32", "cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, target: LanguageModel) -> Path:
    """Answers, stores and what training starts from."""
    folder = tmp_path_factory.mktemp("work")
    write_draft_stores(target, folder, RECIPE, 1, 0, lambda _: None)
    return folder


def answered(folder: Path, target: LanguageModel) -> list[draft_data.Chunk]:
    encoder = demo_encoder(target.folder / "encoder")
    amounts: dict[str, Any] = {"seed": 0, "part": TRAINING, "num_drives": DRIVES, "per_drive": PER_DRIVE}
    return answered_chunks(folder, target, encoder, **amounts, progress=lambda _: None)


def features(work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return rows_in(work / TRAIN)[1:]


def layout_in(work: Path) -> DraftLayout:
    return rows_in(work / TRAIN)[0]


def trained_exit(cfg: Any, seed: int = 0) -> EarlyExitLayers:
    """A drafter whose factors and head are not where they begin."""
    adapter = resume_or_init(RunContext.of(cfg, PairStore.open(cfg.store)), None, CPU).objective.adapter
    assert isinstance(adapter, EarlyExitLayers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factor in adapter.up.values():
            factor.normal_(std=0.1, generator=generator)
        adapter.head += 0.1 * torch.randn(adapter.head.shape, generator=generator)
    return adapter.eval()


@pytest.fixture
def places(target: LanguageModel, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "run").mkdir()
    language_model = target.folder / "language_model"
    return {"out": str(tmp_path / "run"), "language_model": language_model}


@pytest.fixture
def exit_cfg(work: Path, places: dict[str, Any]) -> Any:
    return exit_settings(RECIPE, work, **places)


@pytest.fixture
def drafter(exit_cfg: Any, work: Path, tmp_path: Path) -> Path:
    """A checkpoint of a drafter."""
    features = PairStore.open(work / TRAIN).manifest.features
    save_checkpoint(tmp_path / "exit", trained_exit(exit_cfg), metrics={}, provenance={}, features=features)
    return tmp_path / "exit"


def test_rows_hold_the_targets_own_answers_and_distributions(target: LanguageModel, work: Path) -> None:
    layout, (event_NE, rows_NT) = layout_in(work), features(work)
    some = list(pictures(0, TRAINING, DRIVES, PER_DRIVE, with_events=True))
    rows = unpack(layout, rows_NT.float())
    encoder = demo_encoder(target.folder / "encoder")
    for number, each in enumerate(some):
        said = answer(target, each.image_HWC[None], KEY_ELEMENTS, max_new_tokens=MAX_NEW_TOKENS, with_states=True)
        assert rows.ids_BL[number][rows.used_BL[number]].tolist() == said.tokens
        prompt = target.prompt(each.image_HWC[None], KEY_ELEMENTS)
        context = target.context()
        logits = [context.prefill(target.prefix(prompt))]
        logits += [context.step(said.tokens[:-1])] if len(said.tokens) > 1 else []
        p_AV = torch.cat(logits).double().softmax(dim=1)
        expected = p_AV[:, list(layout.vocabulary)]
        stored = rows_NT[number, -layout.length * len(layout.vocabulary) :].reshape(layout.length, -1)
        torch.testing.assert_close(stored[: len(expected)].double(), expected, rtol=2e-3, atol=1e-5)
        torch.testing.assert_close(
            rows.p_BLI[number, : len(expected)].double(),
            expected / expected.sum(dim=1, keepdim=True),
            rtol=4e-3,
            atol=1e-5,
        )
        assert each.event_HWC is not None
        event_E = encoder.encode([[each.event_HWC]]).flatten().half()
        torch.testing.assert_close(event_NE[number], event_E)
        assert prompt.pixels_TCHW is not None
        image_X = target.picture_embeddings(prompt.pixels_TCHW).flatten()
        torch.testing.assert_close(rows.image_BX[number], image_X, rtol=1e-3, atol=1e-4)
    assert 0.0 <= layout.mass_outside < 1.0
    assert layout.tokens_outside == 0.0


def test_an_interrupted_command_answers_only_what_is_missing(
    target: LanguageModel, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_data, "_answered", None)
    again = answered(work / "answers", target)
    assert ids_of(again) == layout_in(work).vocabulary


def test_the_share_of_tokens_that_a_vocabulary_misses_is_reported(
    target: LanguageModel, work: Path, tmp_path: Path
) -> None:
    chunks = answered(work / "answers", target)
    ids = ids_of(chunks)
    said = [token for chunk in chunks for each in chunk.answers for token in each]
    layout = write_draft_store(tmp_path / "rows", chunks, target, ids[1:], seed=0)
    assert layout.tokens_outside == pytest.approx(said.count(ids[0]) / len(said))
    assert layout.mass_outside > layout_in(work).mass_outside


def test_a_row_of_any_ids_comes_back_and_one_that_is_too_long_is_refused(work: Path) -> None:
    layout = layout_in(work).model_copy(update={"length": 4, "vocabulary": (5, 1023, 49_151), "image_tokens": 1})
    p_LI = np.array([[0.5, 0.25, 0.25], [0.0, 0.1, 0.0]])
    row = pack(layout, np.ones(layout.width), [49_151, 1024], p_LI)
    rows = unpack(layout, torch.from_numpy(row)[None].float())
    assert rows.ids_BL.tolist() == [[49_151, 1024]]
    np.testing.assert_allclose(rows.p_BLI[0].numpy(), [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    with pytest.raises(InputError, match="an answer has 5 tokens, and rows hold 4"):
        pack(layout, np.ones(layout.width), range(5), np.zeros((5, 3)))


def test_the_network_is_the_first_layers_with_merged_factors_by_hand(
    target: LanguageModel, work: Path, exit_cfg: Any
) -> None:
    layout, rows = layout_in(work), unpack(layout_in(work), features(work)[1].float())
    exit_layers = trained_exit(exit_cfg)
    model = AutoModelForCausalLM.from_pretrained(target.folder / "language_model", dtype=torch.float32)
    merge_changes(model.model.layers[:1], exit_layers.changes())
    frozen = FrozenDrafter(exit_layers, target.folder / "language_model", layout)
    positions = frozen._objective.positions(rows.image_BX, rows)
    objective = resume_or_init(RunContext.of(exit_cfg, PairStore.open(exit_cfg.store)), None, CPU).objective
    objective.adapter.load_state_dict(exit_layers.state_dict())
    assert isinstance(objective, DraftObjective)
    trained = objective.positions(rows.image_BX, rows)
    for number in range(3):
        ids = rows.ids_BL[number][rows.used_BL[number]]
        embed = model.get_input_embeddings()
        parts = [rows.image_BX[number].reshape(-1, layout.width), embed(torch.tensor(layout.after)), embed(ids[:-1])]
        one_1PD = torch.cat(parts)[None]
        place_1P = torch.arange(one_1PD.shape[1])[None]
        mask = torch.full((1, 1, one_1PD.shape[1], one_1PD.shape[1]), -torch.inf).triu(1)
        layer = model.model.layers[0](
            one_1PD, attention_mask=mask, position_embeddings=model.model.rotary_emb(one_1PD, place_1P)
        )
        layer = layer[0] if isinstance(layer, tuple) else layer
        states = model.model.norm(layer)[0, -len(ids) :]
        expected = (states @ exit_layers.head.T).log_softmax(dim=1)
        for found in (positions, trained):
            torch.testing.assert_close(found.log_q_BLI[number, : len(ids)], expected, rtol=1e-4, atol=1e-4)


def test_the_count_along_the_answer_is_that_of_live_decoding(
    target: LanguageModel, work: Path, exit_cfg: Any
) -> None:
    layout, (_, rows_NT) = layout_in(work), features(work)
    rows = unpack(layout, rows_NT.float())
    some = list(pictures(0, TRAINING, DRIVES, PER_DRIVE))
    passes = 0
    for seed in range(2):
        exit_layers = trained_exit(exit_cfg, seed)
        shown_NX = rows.image_BX.roll(seed, dims=0)  # another picture is shown than the target sees
        drafted = FrozenDrafter(exit_layers, target.folder / "language_model", layout).along(rows_NT, shown_NX)
        live = ExitModel(target.folder / "language_model", exit_layers, target)
        for number, each in enumerate(some):
            prompt = target.prompt(each.image_HWC[None], KEY_ELEMENTS)
            shown_PD = target.prefix(prompt, shown_NX[number].reshape(-1, layout.width))
            proposer = ModelProposer(live, lambda shown=shown_PD: shown, target.vocabulary_size, None)  # type: ignore[misc]
            done = decoded(target, each.image_HWC, lambda _, proposer=proposer: proposer)  # type: ignore[misc]
            assert len(done.tokens) == drafted.tokens_N[number]
            assert len(done.passes) == drafted.passes_N[number]
            passes += len(done.passes)
    assert passes < 2 * sum(drafted.tokens_N), "some drafts were accepted"


def test_the_replayed_passes_of_a_product_with_hybrid_are_those_of_live_decoding(
    target: LanguageModel, work: Path, exit_cfg: Any
) -> None:
    layout, (_, rows_NT) = layout_in(work), features(work)
    rows = unpack(layout, rows_NT.float())
    exit_layers = trained_exit(exit_cfg)
    ids, folder = exit_layers.config.vocabulary, target.folder / "language_model"
    frozen, live = FrozenDrafter(exit_layers, folder, layout), ExitModel(folder, exit_layers, target)
    hybrid = HybridDrafter()
    answers = [
        AnsweredPrompt(Prompt(KEY_ELEMENTS, (), sequence=str(number)), tuple(ids_L[used_L].tolist()))
        for number, (ids_L, used_L) in enumerate(zip(rows.ids_BL, rows.used_BL, strict=True))
    ]
    hybrid.fit(answers[:3])
    q = {str(number): q_AI for number, q_AI in enumerate(frozen.probabilities(rows_NT, rows.image_BX))}
    replayed = replay(WithDrafter(hybrid, ids, q), answers)
    asked: list[int] = []
    for number, each in enumerate(pictures(0, TRAINING, DRIVES, PER_DRIVE)):
        prefix_PD = target.prefix(target.prompt(each.image_HWC[None], KEY_ELEMENTS))
        proposer = ProductProposer(
            live,
            lambda shown=prefix_PD: shown,  # type: ignore[misc]
            target.vocabulary_size,
            None,
            ids=ids,
            expected=partial(hybrid.expected, answers[number].prompt),
        )
        done = decoded(target, each.image_HWC, lambda _, proposer=proposer: proposer)  # type: ignore[misc]
        assert done.tokens == answers[number].answer
        asked.append(len(done.passes))
        proposer.propose((), MAX_NEW_TOKENS)  # as `decode` asks what it says by itself
        hybrid.update(answers[number].prompt, done.tokens)
    assert asked == replayed.passes_N.tolist()
    alone = frozen.along(rows_NT, rows.image_BX).passes_N
    assert sum(asked) < alone.sum(), "answers that were learnt help"


def test_event_tokens_begin_at_the_mean_and_learn_through_a_drafter_that_does_not(
    work: Path, places: dict[str, Any], drafter: Path
) -> None:
    event_NE, rows_NT = features(work)
    layout = layout_in(work)
    mean_X = unpack(layout, rows_NT.float()).image_BX.mean(dim=0)
    losses = ("kl", "acceptance", "lk", "accepted_length", "cosine")
    for weights in (*({name: 1.0} for name in losses), {"kl": 1.0, "cosine": 1.0}):
        cfg = event_settings(RECIPE, work, weights, drafter=drafter, **places)
        state = resume_or_init(RunContext.of(cfg, PairStore.open(cfg.store)), None, CPU)
        objective = state.objective
        torch.testing.assert_close(objective.adapter.eval()(event_NE.float())[0], mean_X, rtol=1e-3, atol=1e-3)
        objective.train()
        assert isinstance(objective, DraftObjective)
        frozen = objective.network._exit.state_dict()
        before = {key: each.clone() for key, each in frozen.items()}
        cfg = cfg.model_copy(update={"dropout": 0.0})
        sums = []
        for _ in range(8):
            objective.adapter.eval()
            result = training_step(
                objective, state.optimizer, event_NE.float(), rows_NT.float(), None, global_pairs=len(event_NE)
            )
            sums.append(result.loss_sum)
        assert sums[-1] < sums[0], weights
        assert all(torch.equal(frozen[key], each) for key, each in before.items())
        assert {key for key, each in objective.named_parameters() if each.grad is not None}


def test_a_constant_is_the_same_for_every_event(work: Path, places: dict[str, Any], drafter: Path) -> None:
    cfg = event_settings(RECIPE, work, {"kl": 1.0}, constant=True, drafter=drafter, **places)
    objective = resume_or_init(RunContext.of(cfg, PairStore.open(cfg.store)), None, CPU).objective
    with torch.no_grad():
        torch.nn.init.normal_(objective.adapter.map.output.weight)
    tokens_BX = objective.adapter.eval()(features(work)[0].float())
    assert torch.equal(tokens_BX, tokens_BX[:1].expand_as(tokens_BX))
    assert not torch.equal(tokens_BX[0], objective.adapter.map.target_mean)


def test_validation_sees_every_answer_and_a_batch_without_pairs_has_a_gradient(work: Path, exit_cfg: Any) -> None:
    event_NE, rows_NT = features(work)
    context = RunContext.of(exit_cfg, PairStore.open(exit_cfg.store))
    state = resume_or_init(context, None, CPU)
    pairs = PairTensors(np.arange(len(event_NE)), event_NE, rows_NT)
    found = validate(state.objective, pairs, WorkerContext(context, 0, 1, CPU), "epoch 1")
    assert found["cos_sim_mean"] == pytest.approx(1.0)
    exit_layers = state.objective.adapter
    assert isinstance(exit_layers, EarlyExitLayers)
    folder, layout = exit_cfg.language_model, layout_in(work)
    drafted = FrozenDrafter(exit_layers, folder, layout).along(rows_NT, unpack(layout, rows_NT.float()).image_BX)
    assert found["tokens_per_target_pass"] == pytest.approx(drafted.tokens_N.sum() / drafted.passes_N.sum())
    state = resume_or_init(context, None, CPU)
    losses = state.objective.train()(event_NE[:0].float(), rows_NT[:0].float())
    assert losses["loss"].shape == losses["cos_sim"].shape == (0,)
    losses["loss"].sum().backward()


def test_what_does_not_fit_is_said_by_name(
    work: Path, places: dict[str, Any], drafter: Path, small_store: Path, exit_cfg: Any
) -> None:
    with pytest.raises(ConfigError, match="an early exit is a drafter itself"):
        event_settings(RECIPE, work, {"kl": 1.0}, **places)
    with pytest.raises(ConfigError, match=r"--kl-weight, --reverse-kl-weight, .* are all 0"):
        event_settings(RECIPE, work, {}, drafter=drafter, **places)
    plain = exit_cfg.model_copy(update={"store": str(small_store)})
    with pytest.raises(ConfigError, match="holds no answers of a target with their distributions"):
        RunContext.of(plain, PairStore.open(small_store))
    layout, exit_layers = layout_in(work), trained_exit(exit_cfg)
    smaller = replace(exit_layers.config, vocabulary=layout.vocabulary[1:])
    other = EarlyExitLayers(smaller)
    other.load_state_dict({**exit_layers.state_dict(), "head": exit_layers.head[1:]})
    features = PairStore.open(work / TRAIN).manifest.features
    save_checkpoint(drafter.parent / "less", other, metrics={}, provenance={}, features=features)
    cfg = event_settings(RECIPE, work, {"kl": 1.0}, drafter=drafter.parent / "less", **places)
    with pytest.raises(ConfigError, match=r"drafts \d+ tokens, .* have \d+, and 1 of these it cannot say"):
        resume_or_init(RunContext.of(cfg, PairStore.open(cfg.store)), None, CPU)


def test_principal_directions_are_those_of_numpy_and_what_does_not_vary_is_left_out() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 20)) + 5.0
    mean, basis, scale = subspace(torch.tensor(x, dtype=torch.float32), 6)
    np.testing.assert_allclose(mean.numpy(), x.mean(axis=0), rtol=1e-5)
    covariance = np.cov(x.T, bias=True)
    values = np.sort(np.linalg.eigvalsh(covariance))[::-1]
    np.testing.assert_allclose(scale[:3].numpy() ** 2, values[:3], rtol=1e-4)
    np.testing.assert_allclose((covariance @ basis[:, :3].numpy()) / values[:3], basis[:, :3].numpy(), atol=1e-4)
    assert not basis[:, 3:].any()
    assert scale[3:].tolist() == [1.0] * 3
