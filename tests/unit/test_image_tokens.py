"""Image tokens and LoRA: what training minimises is the loss of the merged model, and resuming changes no bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_eye
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from ray_app.commands.demo.projector_start import projector_start, solve_probe
from ray_app.commands.demo.target import identity_of, join_parts, write_parts, write_target
from ray_app.commands.train.context import RunContext
from ray_app.commands.train.loop import WorkerContext, WorkerData, batches_in_memory, train_epoch
from ray_app.commands.train.state import Checkpointer, TrainState, resume_or_init
from ray_app.config.train import AnswerTrainConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.core.adapters.registry import build_adapter
from ray_app.data.array_store import write_store
from ray_app.data.batch_order import ShardedBatchOrder
from ray_app.data.pair_tensors import PairTensors
from ray_app.errors import CheckpointError, InputError
from ray_app.language_models.answer_objective import AnswerObjective, pack_row, shape_of, unpack_row
from ray_app.language_models.answers import answer, greedy_batch
from ray_app.language_models.kinds import load
from ray_app.language_models.lora import merge_changes
from ray_app.runs.event_log import EventLog
from ray_app.runs.run_dir import RunDir
from ray_app.scenes.captions import FACTS
from ray_app.store.atomic import sha256_file
from ray_app.store.pair_store import PairStore

CPU = torch.device("cpu")
WIDTH, TOKENS, LENGTH = 9 * 16, len(FACTS), 12


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_eye.save_language_model(folder / "language_model")
    tiny_eye.save_encoder(folder / "encoder")
    return folder


@pytest.fixture
def adapter(models: Path) -> ImageTokens:
    """Image tokens and LoRA factors, none of which is zero."""
    shape = tuple(shape_of(models / "language_model"))
    config = AdapterConfig("image_tokens", WIDTH, LENGTH, 8, rank=2, image_tokens=TOKENS, language_model=shape)
    made = build_adapter(config, 0)
    assert isinstance(made, ImageTokens)
    with torch.no_grad():
        for factor in made.up.values():
            factor.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return made


ROWS = torch.from_numpy(np.stack([pack_row([7, 8, 9], [10, 11, 2], LENGTH), pack_row([7], [12, 0, 5, 2], LENGTH)]))


def test_a_row_keeps_its_tokens() -> None:
    ids, num_answer = unpack_row(ROWS[1])
    assert (ids.tolist(), num_answer) == ([7, 12, 0, 5, 2], 4)
    with pytest.raises(InputError, match="have 13 tokens, and rows hold 12"):
        pack_row(range(6), range(7), LENGTH)


def test_the_loss_is_that_of_the_merged_model_by_hand(models: Path, adapter: ImageTokens) -> None:
    merged = AutoModelForCausalLM.from_pretrained(models / "language_model", dtype=torch.float32)
    merge_changes(merged.model.layers, adapter.changes())
    event_BE = torch.randn(2, WIDTH)
    losses = AnswerObjective(adapter, models / "language_model", CPU)(event_BE, ROWS)
    for row, (question, said) in enumerate((([7, 8, 9], [10, 11, 2]), ([7], [12, 0, 5, 2]))):
        text = merged.get_input_embeddings()(torch.tensor([*question, *said]))
        whole = torch.cat([adapter(event_BE[row : row + 1]).reshape(TOKENS, -1), text])
        logits = merged(inputs_embeds=whole[None]).logits[0, -len(said) - 1 : -1]
        expected = F.cross_entropy(logits, torch.tensor(said))
        torch.testing.assert_close(losses["loss"][row], expected, rtol=1e-4, atol=1e-5)
        assert float(losses["cos_sim"][row]) == pytest.approx(np.mean(logits.argmax(dim=1).numpy() == np.array(said)))


def test_what_is_trained_is_lora_and_the_words_for_scores(models: Path, adapter: ImageTokens) -> None:
    objective = AnswerObjective(adapter, models / "language_model", CPU)
    objective(torch.randn(2, WIDTH), ROWS)["loss"].sum().backward()
    moved = {name for name, each in objective.named_parameters() if each.grad is not None and each.grad.any()}
    assert {name.removeprefix("adapter.") for name in moved} == {
        "projector.2.weight",
        "projector.2.bias",
        *(f"{side}.{key}" for side in ("down", "up") for key in adapter.down),
    }
    assert not any("model" in name for name, _ in objective.named_parameters())


def test_a_batch_without_pairs_has_a_loss_and_a_gradient(models: Path, adapter: ImageTokens) -> None:
    objective = AnswerObjective(adapter, models / "language_model", CPU)
    losses = objective(torch.zeros(0, WIDTH), torch.zeros(0, LENGTH))
    assert losses["loss"].shape == losses["cos_sim"].shape == (0,)
    losses["loss"].sum().backward()


def test_a_probe_finds_what_features_hold_and_the_projector_starts_at_the_words() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = [
        replace(tiny_eye.FACTS, place=place, bend=bend)
        for place in ("city", "suburb", "country", "highway")
        for bend in ("left", "straight", "right")
    ] * 8
    features = torch.randn(len(seen), 64, generator=generator)
    for row, facts in enumerate(seen):
        features[row, ("city", "suburb", "country", "highway").index(facts.place)] += 6.0
        features[row, 8 + ("left", "straight", "right").index(facts.bend)] += 6.0
    probe = solve_probe(features, seen)
    answers = probe.answers(features)
    assert answers["place"] == [facts.place for facts in seen]
    assert answers["bend"] == [facts.bend for facts in seen]
    values = sorted({fact.true(facts) for facts in seen for fact in FACTS.values()})
    words = {value: torch.randn(6, generator=generator) for value in values}
    start = projector_start(probe, features, seen, words)
    assert all(tensor.is_contiguous() for tensor in start.values()), "safetensors takes no others"
    hidden = F.gelu(features @ start["projector.0.weight"].T + start["projector.0.bias"])
    tokens = (hidden @ start["projector.2.weight"].T + start["projector.2.bias"]).reshape(len(seen), len(FACTS), 6)
    place = list(FACTS).index("place")
    nearest = [min(probe.values["place"], key=lambda v: float((words[v] - row[place]).norm())) for row in tokens]
    assert np.mean([one == facts.place for one, facts in zip(nearest, seen, strict=True)]) > 0.95


def test_a_joined_folder_answers_as_adapter_and_merged_model(
    models: Path, adapter: ImageTokens, tmp_path: Path
) -> None:
    write_target(tmp_path / "target", adapter, models / "encoder", models / "language_model", {}, {})
    modes = {path.stat().st_mode for path in (tmp_path / "target").rglob("*") if path.is_dir()}
    assert modes == {(tmp_path / "target").stat().st_mode}, "other users may read it"
    target = load(tmp_path / "target", "float32", "cpu")
    frame = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    said = answer(target, frame[None], "Where are we?", max_new_tokens=6)
    prefix_PD = target.prefix(target.prompt(frame[None], "Where are we?"))
    assert len(prefix_PD) >= TOKENS
    assert (
        greedy_batch(target.model, prefix_PD.expand(3, -1, -1), target.end_token, 6)
        == [[token for token in said.tokens if token != target.end_token]] * 3
    )
    with pytest.raises(InputError, match="already exists"):
        write_target(tmp_path / "target", adapter, models / "encoder", models / "language_model", {}, {})


def test_parts_in_half_precision_join_to_the_target_of_their_numbers(
    models: Path, adapter: ImageTokens, tmp_path: Path
) -> None:
    both = models / "encoder", models / "language_model"
    documents = {"facts.json": {"majority": {}}, "provenance.json": {"seed": 3}}
    write_parts(tmp_path / "parts", adapter, identity_of(*both), documents)
    join_parts(tmp_path / "parts", tmp_path / "joined", *both)
    halved = build_adapter(adapter.config, 0)
    halved.load_state_dict({key: each.half() for key, each in adapter.state_dict().items()})
    assert isinstance(halved, ImageTokens)
    write_target(tmp_path / "direct", halved, *both, {}, {})
    for name in ("model.safetensors", "language_model/model.safetensors", "golden.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes(), name
    origin = json.loads((tmp_path / "joined" / "provenance.json").read_text(encoding="utf-8"))
    assert origin == {"seed": 3, "parts": sha256_file(tmp_path / "parts" / "MANIFEST.sha256")}

    shutil.copytree(both[1], tmp_path / "other")
    (tmp_path / "other" / "origin.json").write_text('{"package": "other==1"}', encoding="utf-8")
    with pytest.raises(InputError, match=r"parts was trained with other models than .*encoder and .*other"):
        join_parts(tmp_path / "parts", tmp_path / "new", both[0], tmp_path / "other")
    (tmp_path / "parts" / "facts.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"facts\.json is damaged"):
        join_parts(tmp_path / "parts", tmp_path / "new", *both)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def cfg(models: Path, tmp_path: Path, adapter: ImageTokens) -> AnswerTrainConfig:
    rng = np.random.default_rng(0)
    write_store(
        tmp_path / "rows",
        event=rng.normal(size=(20, WIDTH)).astype(np.float16),
        target=np.stack([pack_row([7, 8], rng.integers(5, 30, 5).tolist(), LENGTH) for _ in range(20)]),
        sequence=[f"drive{n // 2}" for n in range(20)],
    )
    start = {key: each for key, each in adapter.state_dict().items() if key.startswith("projector")}
    save_file(start, tmp_path / "start.safetensors")
    (tmp_path / "run").mkdir()
    return AnswerTrainConfig(
        store=str(tmp_path / "rows"),
        out=str(tmp_path / "run"),
        language_model=models / "language_model",
        projector_start=tmp_path / "start.safetensors",
        image_tokens=TOKENS,
        hidden_dim=8,
        rank=2,
        batch_size=4,
        learning_rate=0.01,
    )


def trained(cfg: AnswerTrainConfig, stops_after: int) -> TrainState:
    """The state after an epoch; the process dies after some batches and starts again from what was saved."""
    store = PairStore.open(cfg.store)
    context, run = RunContext.of(cfg, store), RunDir(cfg.folder)
    rows = [torch.from_numpy(side) for side in store.read_rows(context.split.train)]
    pairs = PairTensors(np.arange(len(context.split.train)), *rows)
    order = ShardedBatchOrder(len(context.split.train), cfg.batch_size, cfg.seed)
    worker = WorkerContext(context, 0, 1, CPU)
    state = resume_or_init(context, None, CPU)
    with EventLog(cfg.folder) as log:
        keeper = Checkpointer(run, store, log, {})
        for most in (stops_after, None):
            data = WorkerData(lambda _: iter(()), True, None)
            batches = list(batches_in_memory(pairs, order, state, worker))[:most]
            assert train_epoch(state.objective, state, iter(batches), worker, keeper, data)
            if most:
                keeper.within_epoch(state)
                state = resume_or_init(context, run.latest_resumable(), CPU)
    return state


def test_a_run_that_was_killed_ends_with_the_same_bytes(cfg: AnswerTrainConfig, tmp_path: Path) -> None:
    once = trained(cfg, 1)
    (tmp_path / "other").mkdir()
    twice = trained(cfg.model_copy(update={"out": str(tmp_path / "other")}), 2)
    assert once.step == twice.step > 2
    first = once.objective.adapter.state_dict()
    for key, tensor in twice.objective.adapter.state_dict().items():
        assert torch.equal(tensor, first[key]), key
