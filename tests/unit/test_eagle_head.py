"""A head on the target's last states: its layer, the steps of its drafts, their count, and what trains it."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_target
import torch
from small_drafting import decoded, exact_rows, head_that_knows, rows_in, save_part, some_head
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ray_app.commands.demo.answers import TRAINING, pictures
from ray_app.commands.demo.draft_training import (
    STATES,
    TEST,
    TRAIN,
    DraftRecipe,
    drafted_by_eagle,
    eagle_settings,
    write_draft_stores,
)
from ray_app.commands.demo.sight import MAX_NEW_TOKENS
from ray_app.commands.evaluate.drafting import draft_context, evaluate_drafter
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, validate
from ray_app.commands.train.state import resume_or_init
from ray_app.config.evaluate import EvaluationFlags
from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.optimizer_step import training_step
from ray_app.core.speculative.decoding import FixedGamma, Greedy, Proposal, Sampled, decode
from ray_app.core.speculative.teacher_forced import num_passes_by_runs
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import ConfigError
from ray_app.language_models.answers import answer
from ray_app.language_models.draft_rows import DraftLayout, DraftRows, unpack
from ray_app.language_models.eagle.live import EagleModel, EagleProposer
from ray_app.language_models.eagle.network import EagleNetwork, Seen, frozen_model
from ray_app.language_models.eagle.objective import EagleObjective
from ray_app.language_models.kinds import load
from ray_app.language_models.model import LanguageModel
from ray_app.scenes.captions import KEY_ELEMENTS
from ray_app.store.checkpoint import load_checkpoint
from ray_app.store.pair_store import PairStore

CPU = torch.device("cpu")
DRIVES, PER_DRIVE = 4, 2
RECIPE = DraftRecipe(drives=DRIVES, per_drive=PER_DRIVE, batch_size=4)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(tiny_target.save_target(tmp_path_factory.mktemp("models")), "float32", "cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, target: LanguageModel) -> Path:
    """Answers, stores with the target's states, and what training starts from."""
    folder = tmp_path_factory.mktemp("work")
    write_draft_stores(target, folder, RECIPE, 1, 0, lambda _: None, states=True)
    return folder


@pytest.fixture
def cfg(work: Path, target: LanguageModel, tmp_path: Path) -> Any:
    (tmp_path / "run").mkdir()
    return eagle_settings(RECIPE, work, out=str(tmp_path / "run"), language_model=target.folder / "language_model")


def rows_of(work: Path) -> tuple[DraftLayout, torch.Tensor, torch.Tensor, DraftRows]:
    layout, event_NE, rows_NT = rows_in(work / (TRAIN + STATES))
    return layout, event_NE, rows_NT, unpack(layout, rows_NT.float())


def test_rows_hold_the_states_that_chose_the_tokens(target: LanguageModel, work: Path) -> None:
    *_, rows = rows_of(work)
    for number, each in enumerate(pictures(0, TRAINING, DRIVES, PER_DRIVE)):
        said = answer(target, each.image_HWC[None], KEY_ELEMENTS, max_new_tokens=MAX_NEW_TOKENS, with_states=True)
        used_L = rows.used_BL[number]
        assert rows.ids_BL[number][used_L].tolist() == said.tokens
        assert said.states_TD is not None
        torch.testing.assert_close(rows.states_BLD[number][used_L], said.states_TD.float(), rtol=2e-2, atol=2e-2)
        assert not rows.states_BLD[number][~used_L].any()


def test_the_layer_is_that_of_transformers_on_what_fc_makes(cfg: Any, work: Path) -> None:
    *_, rows = rows_of(work)
    head, model = some_head(cfg), frozen_model(cfg.language_model, CPU)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    tensors = {f"self_attn.{name}.weight": head.maps[name] for name in names}
    tensors |= {f"mlp.{name}_proj.weight": head.maps[f"{name}_proj"] for name in ("gate", "up", "down")}
    tensors |= {f"{name}.weight": head.norms[name] for name in ("input_layernorm", "post_attention_layernorm")}
    layer = LlamaDecoderLayer(model.config, 0)
    layer.load_state_dict(tensors)
    width, length = rows.states_BLD.shape[2], rows.states_BLD.shape[1]
    fc = head.maps["fc"]
    x_BLD = model.model.embed_tokens(rows.ids_BL) @ fc[:, :width].T + rows.states_BLD @ fc[:, width:].T
    mask = torch.full((1, 1, length, length), -torch.inf).triu(1)
    angles = model.model.rotary_emb(x_BLD, torch.arange(length)[None])
    expected = layer(x_BLD, attention_mask=mask, position_embeddings=angles)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = expected * torch.rsqrt(expected.square().mean(dim=2, keepdim=True) + model.config.rms_norm_eps)
    network = EagleNetwork(model, head)
    (found,) = network.unrolled(rows.states_BLD, rows.ids_BL, 1)
    torch.testing.assert_close(found, expected * head.norms["norm"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.logits(found), found @ head.maps["head"].T)


def test_every_step_from_every_position_is_what_reading_one_by_one_says(cfg: Any, work: Path) -> None:
    *_, rows = rows_of(work)
    head = some_head(cfg)
    network = EagleNetwork(frozen_model(cfg.language_model, CPU), head)
    steps = network.unrolled(rows.states_BLD, rows.ids_BL, 4)
    ids, states = rows.ids_BL[0][rows.used_BL[0]], rows.states_BLD[0][rows.used_BL[0]]
    for first in (0, 1, 5, len(ids) - 2):
        seen, hidden = Seen(), torch.empty(0)
        for place in range(min(first + 4, len(ids))):
            state = states[None, place : place + 1] if place <= first else hidden
            sees = torch.ones(1, place + 1, dtype=torch.bool)
            hidden = network.read(ids[None, place : place + 1], state, torch.tensor([place]), seen, sees)
            if place >= first:
                found = steps[place - first][0, first]
                torch.testing.assert_close(found, hidden[0, 0], rtol=1e-4, atol=1e-4)


class Scripted:
    """Drafts the answer itself, with one wrong token at the end of each run."""

    def __init__(self, said: list[int], runs: list[int]) -> None:
        self._said, self._runs = said, runs

    def propose(self, accepted: Any, num_tokens: int) -> Proposal:
        last = max(len(accepted) - 1, 0)
        right = self._said[len(accepted) : last + 1 + self._runs[last]]
        return Proposal((*right, 0, 0)[:num_tokens])


class Recorded:
    """A target that gives one answer, of tokens of at least 1."""

    def __init__(self, said: list[int], size: int) -> None:
        self._rows, self._place = torch.nn.functional.one_hot(torch.tensor([*said, *[0] * 20]), size), 0

    def prefill(self, _: Any) -> torch.Tensor:
        return self._rows[:1]

    def step(self, tokens: Any) -> torch.Tensor:
        self._place += len(tokens)
        return self._rows[self._place - len(tokens) + 1 : self._place + 1]

    def crop(self, num_tokens: int) -> None:
        self._place -= num_tokens


@pytest.mark.parametrize("gamma", [1, 2, 5, 8])
def test_passes_by_runs_are_those_of_the_loop_of_decode(gamma: int) -> None:
    rng = np.random.default_rng(gamma)
    for length in (1, 2, 3, 9, 30):
        for _ in range(20):
            said = [*rng.integers(1, 8, length - 1).tolist(), 9]
            runs = [int(rng.integers(0, min(6, length - n))) for n in range(length)]
            done = decode(
                Recorded(said, 10),
                None,
                Scripted(said, runs),
                choice=Greedy(),
                gamma=FixedGamma(gamma),
                max_new_tokens=length + 20,
                end_token=9,
                clock=lambda: 0.0,
            )
            assert list(done.tokens) == said
            assert len(done.passes) == num_passes_by_runs(runs, gamma), (said, runs)


def test_the_count_from_every_position_is_that_of_live_decoding(target: LanguageModel, work: Path, cfg: Any) -> None:
    layout, *_, rows = rows_of(work)
    rows_NT = exact_rows(work)  # rows hold half precision, a live draft the states
    assert torch.allclose(unpack(layout, rows_NT).states_BLD, rows.states_BLD, rtol=1e-2, atol=1e-2)
    passes = tokens = 0
    for head in (some_head(cfg, noise=0.02), head_that_knows(cfg, rows_NT)):
        drafted = drafted_by_eagle(head, cfg.language_model, layout, rows_NT)
        model = EagleModel(head, target)
        for number, each in enumerate(pictures(0, TRAINING, DRIVES, PER_DRIVE)):
            done = decoded(target, each.image_HWC, partial(EagleProposer, model, sampled=None))
            assert len(done.tokens) == drafted.tokens_N[number]
            assert len(done.passes) == drafted.passes_N[number]
            passes, tokens = passes + len(done.passes), tokens + len(done.tokens)
    assert passes < 0.8 * tokens, "many drafts of one head were accepted"


@torch.no_grad()
def test_states_are_those_of_one_context_and_no_hook_is_left(target: LanguageModel) -> None:
    one, other = target.context(), target.context()
    states = one.keep_states()
    prefix_PD = target.prefix(target.prompt(None, KEY_ELEMENTS))
    other.prefill(prefix_PD)
    head = target.model.get_output_embeddings()
    assert not states
    logits = [one.prefill(prefix_PD)]
    other.step([5, 6])
    logits.append(one.step([7, 8, 9]))
    assert [len(each_KD) for each_KD in states] == [1, 3]
    for states_KD, logits_KV in zip(states, logits, strict=True):
        torch.testing.assert_close(head(states_KD), logits_KV)
    assert not head._forward_pre_hooks


@torch.no_grad()
def test_a_drawn_draft_says_what_each_token_was_drawn_from(target: LanguageModel, cfg: Any) -> None:
    model, sampled = EagleModel(some_head(cfg, noise=0.02), target), Sampled(0.7, 0.9, np.random.default_rng(3))
    prefix_PD = target.prefix(target.prompt(None, KEY_ELEMENTS))
    context, same = target.context(), target.context()
    proposer, states = EagleProposer(model, context, sampled), same.keep_states()
    logits_1V = context.prefill(prefix_PD)
    same.prefill(prefix_PD)
    found = proposer.propose((), 6)
    states_BLD = torch.nn.functional.pad(states[0][None], (0, 0, 0, len(found.tokens) - 1))
    steps = model.network.unrolled(states_BLD, torch.tensor([found.tokens]), len(found.tokens) - 1)
    expected_GV = np.zeros((len(found.tokens), target.vocabulary_size))
    expected_GV[:1] = sampled.probabilities(logits_1V)
    for row, states_1LD in zip(expected_GV[1:], steps, strict=True):
        row[model.ids_I] = sampled.probabilities(model.network.logits(states_1LD[:, 0]))[0]
    assert found.probabilities_GV is not None
    np.testing.assert_allclose(found.probabilities_GV, expected_GV, atol=1e-5)
    assert all(row[token] > 0.0 for row, token in zip(found.probabilities_GV, found.tokens, strict=True))


def test_drafts_of_any_length_and_drawn_ones_change_no_greedy_text(
    target: LanguageModel, work: Path, cfg: Any
) -> None:
    *_, rows = rows_of(work)
    model = EagleModel(some_head(cfg, noise=0.02), target)
    rng = np.random.default_rng(0)

    class AnyGamma:
        def choose(self) -> int:
            return int(rng.integers(0, 5))

        def observe(self, done: Any) -> None:
            pass

    for number, each in enumerate(pictures(0, TRAINING, DRIVES, PER_DRIVE)):
        for sampled in (None, Sampled(1.0, 1.0, rng)):
            done = decoded(target, each.image_HWC, partial(EagleProposer, model, sampled=sampled), AnyGamma())
            assert list(done.tokens) == rows.ids_BL[number][rows.used_BL[number]].tolist()


def test_the_loss_compares_each_step_with_the_token_that_it_drafts(work: Path, cfg: Any) -> None:
    _, event_NE, rows_NT, rows = rows_of(work)
    cfg = cfg.model_copy(update={"draft_steps": 2, "mse_weight": 0.5, "cosine_weight": 0.25})
    state = resume_or_init(RunContext.of(cfg, PairStore.open(cfg.store)), None, CPU)
    objective = state.objective.eval()
    assert isinstance(objective, EagleObjective)
    with torch.no_grad():
        found = objective.losses(event_NE.float(), rows_NT.float())
        steps = objective.network.unrolled(rows.states_BLD, rows.ids_BL, 2)
        logits = [objective.network.logits(states_BLD) for states_BLD in steps]
    for number, used_L in enumerate(rows.used_BL):
        length = int(used_L.sum())
        each = []
        for step in range(2):
            p = rows.p_BLI[number, 1 + step : length].double()
            q = logits[step][number, : length - 1 - step].double().log_softmax(dim=1)
            each.append(float((torch.xlogy(p, p) - p * q).sum(dim=1).mean()))
        own, predicted = rows.states_BLD[number, 1:length], steps[0][number, : length - 1]
        mse = float((own - predicted).square().mean())
        cos = float(torch.cosine_similarity(own, predicted, dim=1).mean())
        assert float(found["mse"][number]) == pytest.approx(mse, rel=1e-4)
        assert float(found["cos_sim"][number]) == pytest.approx(cos, abs=1e-5)
        expected = np.mean(each) + 0.5 * mse + 0.25 * (1.0 - cos)
        assert float(found["loss"][number]) == pytest.approx(expected, rel=1e-4)


def test_a_head_learns_and_the_target_does_not(work: Path, cfg: Any) -> None:
    layout, event_NE, rows_NT, _ = rows_of(work)
    context = RunContext.of(cfg, PairStore.open(cfg.store))
    state = resume_or_init(context, None, CPU)
    objective = state.objective.train()
    losses = []
    for _ in range(12):
        step = training_step(
            objective, state.optimizer, event_NE.float(), rows_NT.float(), None, global_pairs=len(event_NE)
        )
        losses.append(step.loss_sum)
    assert losses[-1] < 0.9 * losses[0]
    assert all(each.grad is not None and each.grad.any() for each in objective.parameters())
    assert isinstance(objective, EagleObjective)
    assert not objective.network._embed.weight.requires_grad
    pairs = PairTensors(np.arange(len(event_NE)), event_NE, rows_NT)
    found = validate(objective, pairs, WorkerContext(context, 0, 1, CPU), "epoch 1")
    assert isinstance(objective.adapter, EagleHead)
    drafted = drafted_by_eagle(objective.adapter, cfg.language_model, layout, rows_NT)
    assert found["tokens_per_target_pass"] == pytest.approx(drafted.tokens_N.sum() / drafted.passes_N.sum())
    assert 0.0 < found["cos_sim_mean"] < 1.0
    empty = objective.train()(event_NE[:0].float(), rows_NT[:0].float())
    assert empty["loss"].shape == empty["cos_sim"].shape == (0,)
    empty["loss"].sum().backward()


def test_a_head_is_evaluated_by_the_same_count(work: Path, cfg: Any, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_part(tmp_path / "head", cfg))
    context = draft_context(EvaluationFlags(batch_size=4), str(work / (TEST + STATES)), checkpoint)
    found = evaluate_drafter(context, checkpoint)
    layout, _, rows_NT = rows_in(work / (TEST + STATES))
    assert isinstance(checkpoint.adapter, EagleHead)
    drafted = drafted_by_eagle(checkpoint.adapter, cfg.language_model, layout, rows_NT)
    assert found.passes_N.tolist() == drafted.passes_N.tolist()
    assert set(found.baselines) == {"no_drafter"}


def test_rows_without_states_and_a_head_behind_a_drafter_are_refused(
    target: LanguageModel, work: Path, cfg: Any, tmp_path: Path
) -> None:
    write_draft_stores(target, work, RECIPE, 1, 0, lambda _: None)
    plain = cfg.model_copy(update={"store": str(work / TRAIN)})
    with pytest.raises(ConfigError, match=r"train holds no states of the target, which an eagle_head reads"):
        RunContext.of(plain, PairStore.open(work / TRAIN))
    with pytest.raises(ConfigError, match="as an eagle_head is"):
        eagle_settings(RECIPE, work, out=str(tmp_path), language_model=cfg.language_model, drafter=tmp_path)
