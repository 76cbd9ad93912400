"""A drafter that sees events, as a folder and in `decode`: it changes no text, and belongs to one target."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_target
import torch

from ray_app.commands.decode.command import plan_of, run_decode
from ray_app.commands.decode.compare import read_run
from ray_app.commands.demo import decode as demo_decode
from ray_app.commands.demo import shipped
from ray_app.commands.demo.decode import png
from ray_app.config.decode import DecodeConfig
from ray_app.config.demo import DemoDecodeConfig
from ray_app.core.adapters.config import AdapterConfig
from ray_app.core.adapters.drafting import EarlyExitLayers, EventTokens
from ray_app.core.adapters.registry import build_adapter
from ray_app.core.speculative.decoding import Sampled
from ray_app.core.speculative.product import LEAST
from ray_app.errors import CheckpointError, ConfigError, InputError, RayAppError
from ray_app.language_models.answer_objective import shape_of
from ray_app.language_models.draft_rows import DraftLayout
from ray_app.language_models.drafter_folder import EventDrafter, read_drafter, write_drafter
from ray_app.language_models.drafting import ProductProposer
from ray_app.language_models.exit_network import ExitModel
from ray_app.language_models.joined import CHECKSUMS
from ray_app.language_models.kinds import load
from ray_app.store.atomic import sha256_file

VOCABULARY = (2, *range(5, 40))
ROW = 12


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target.save_target(tmp_path_factory.mktemp("models"))


def layout_for(target: Path) -> DraftLayout:
    return DraftLayout(
        target=sha256_file(target / CHECKSUMS),
        question="?",
        before=(),
        after=(1,),
        vocabulary=VOCABULARY,
        vocabulary_size=200,
        end_token=2,
        image_tokens=tiny_target.IMAGE_TOKENS,
        width=32,
        length=4,
        mass_outside=0.0,
        tokens_outside=0.0,
    )


@pytest.fixture
def drafter(target: Path, tmp_path: Path) -> Path:
    """A drafter with random parts."""
    shape = shape_of(target / "language_model")._replace(layers=1)
    sizes: dict[str, Any] = {"language_model": tuple(shape), "image_tokens": tiny_target.IMAGE_TOKENS, "rank": 2}
    exit_layers = build_adapter(
        AdapterConfig("early_exit", tiny_target.EVENT_WIDTH, ROW, vocabulary=VOCABULARY, **sizes), 0
    )
    events = build_adapter(AdapterConfig("event_tokens", tiny_target.EVENT_WIDTH, ROW, **sizes), 0)
    assert isinstance(exit_layers, EarlyExitLayers)
    assert isinstance(events, EventTokens)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        exit_layers.head.normal_(generator=generator)
        for each in (events.map.event_basis, events.map.target_basis, events.map.output.weight):
            each.normal_(generator=generator)
    write_drafter(tmp_path / "drafter", [exit_layers, events], layout_for(target), {"seed": 0})
    return tmp_path / "drafter"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two rows of two drives, with a frame and an event image each."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(4):
        for kind in ("frame", "events"):
            image = rng.integers(0, 255, (56, 56, 3), dtype=np.uint8)
            (tmp_path / f"{kind}{number}.png").write_bytes(png(image))
        lines.append(
            {"sequence": f"drive{number // 2}", "frames": [f"frame{number}.png"], "events": [f"events{number}.png"]}
        )
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_folder_comes_back_as_it_was_up_to_half_precision(target: Path, drafter: Path) -> None:
    model = load(target, "float32", "cpu")
    found = read_drafter(drafter, model)
    assert isinstance(found, EventDrafter)
    assert found.exit_layers.config.vocabulary == VOCABULARY
    image = np.random.default_rng(1).integers(0, 255, (1, 56, 56, 3), dtype=np.uint8)
    tokens_ND = found.image_tokens(image)
    assert tokens_ND.shape == (tiny_target.IMAGE_TOKENS, 32)
    features = model._encoder.encode([[image[0]]]).flatten(1).half().float()  # type: ignore[attr-defined]
    torch.testing.assert_close(tokens_ND.flatten(), found.events(features)[0])
    with pytest.raises(InputError, match="is shown one event image; 2 given"):
        found.image_tokens(np.concatenate([image, image]))


def test_a_drafter_that_sees_changes_no_text_whatever_it_is_shown(
    target: Path, drafter: Path, prompts: Path, tmp_path: Path
) -> None:
    sees = ("events", "frames", "other", "constant", "nothing")
    cfg = DecodeConfig(
        source=(prompts,),
        target=target,
        out=tmp_path / "out",
        drafter=(str(drafter),),
        drafter_sees=sees,
        max_new_tokens=12,
        draft_length="fixed",
        dtype="float32",
        watch=True,
    )
    result = run_decode(cfg)["results"]
    assert set(result) == {f"drafter-{each}" for each in sees}
    assert all(each["texts_that_differ"] == 0 for each in result.values())
    lines = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    drafted = {tuple(line["drafters"][f"drafter-{each}"]["own_tokens"]) for line in lines[:1] for each in sees}
    assert len(drafted) > 1, "what is shown decides what is drafted"
    alone = run_decode(cfg.model_copy(update={"drafter_sees": (), "out": tmp_path / "alone"}))["results"]
    assert list(alone) == ["drafter"]
    assert alone["drafter"]["tokens_per_target_pass"] == result["drafter-events"]["tokens_per_target_pass"]
    assert read_run(tmp_path / "alone").baseline("drafter") is None
    assert read_run(tmp_path / "out").baseline("drafter-nothing") == "nothing"


def test_demo_decode_takes_the_drafter_of_the_package_where_it_fits(
    target: Path, drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "EVENT_DRAFTER", drafter)
    monkeypatch.setattr(demo_decode, "MAX_NEW_TOKENS", 12)
    cfg = DemoDecodeConfig(target=target, out=tmp_path / "out", num_pictures=2, dtype="float32")
    results = demo_decode.run_demo_decode(cfg)["results"]
    assert {name: each["texts_that_differ"] for name, each in results.items()} == {
        "hybrid": 0,
        "previous_window": 0,
        "drafter": 0,
    }
    (drafter / "early_exit.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"early_exit\.safetensors is damaged"):
        shipped.shipped_drafter(target)


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 la57", "bfloat16"),
        ("flags\t\t: amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: asimd i8mm bf16", "bfloat16"),
        ("flags\t\t: fpu avx2 avx512f", "float32"),
    ],
)
def test_the_demo_computes_in_bf16_where_the_processor_does(flags: str, dtype: str) -> None:
    assert demo_decode.processor_dtype(flags) == dtype


def test_with_hybrid_it_learns_from_answers_and_changes_no_text(
    target: Path, drafter: Path, prompts: Path, tmp_path: Path
) -> None:
    cfg = DecodeConfig(
        source=(prompts,),
        target=target,
        out=tmp_path / "first",
        drafter=(str(drafter), f"hybrid+{drafter}", "hybrid"),
        drafter_sees=("events", "nothing"),
        max_new_tokens=12,
        draft_length="fixed",
        dtype="float32",
        watch=True,
    )
    first = run_decode(cfg)["results"]
    mixed = [f"hybrid+drafter-{sees}" for sees in ("events", "nothing")]
    assert list(first) == ["drafter-events", "drafter-nothing", *mixed, "hybrid"]
    assert all(each["texts_that_differ"] == 0 for each in first.values())
    traces = tmp_path / "first" / "traces" / "hybrid_drafter-events.jsonl"
    again = run_decode(cfg.model_copy(update={"learn_from": (traces,), "out": tmp_path / "again"}))["results"]
    assert all(each["texts_that_differ"] == 0 for each in again.values())
    for name in mixed:
        learnt = again[name]["tokens_per_target_pass"]
        assert learnt > first[name]["tokens_per_target_pass"], "it has seen the same answers"
        assert learnt > again[name.removeprefix("hybrid+")]["tokens_per_target_pass"]


def test_with_hybrid_a_token_is_drawn_from_the_product(target: Path, drafter: Path) -> None:
    model = load(target, "float32", "cpu")
    event_drafter = read_drafter(drafter, model)
    assert isinstance(event_drafter, EventDrafter)
    exit_model = ExitModel(model.text_folder(), event_drafter.exit_layers, model)
    prefix_PD = model.prefix(model.prompt(None, "?"))
    context = exit_model.context()
    context.prefill(prefix_PD)
    q_V = context.step([5, 6])[-1].double().softmax(dim=0).numpy()
    p = {6: 0.7, 100: 0.3}
    sampled = Sampled(1.0, 1.0, np.random.default_rng(0))
    proposer = ProductProposer(
        exit_model, lambda: prefix_PD, model.vocabulary_size, sampled, ids=VOCABULARY, expected=lambda _: p
    )
    expected_V = np.zeros(model.vocabulary_size)
    expected_V[list(VOCABULARY)] = LEAST * np.maximum(q_V[list(VOCABULARY)], LEAST)
    expected_V[6] = 0.7 * max(q_V[6], LEAST)
    expected_V[100] = 0.3 * LEAST
    found_GV = proposer.propose([5, 6], 1).probabilities_GV
    np.testing.assert_allclose(found_GV, [expected_V / expected_V.sum()], rtol=1e-5)


def damaged(drafter: Path) -> None:
    (drafter / "drafter.json").write_text("{}", encoding="utf-8")


def of_another_target(drafter: Path) -> None:
    document = json.loads((drafter / "drafter.json").read_text(encoding="utf-8"))
    document["layout"]["target"] = "0" * 64
    (drafter / "drafter.json").write_text(json.dumps(document), encoding="utf-8")
    sums = (drafter / "MANIFEST.sha256").read_text().splitlines()
    sums = [
        f"{sha256_file(drafter / 'drafter.json')}  drafter.json" if line.endswith("  drafter.json") else line
        for line in sums
    ]
    (drafter / "MANIFEST.sha256").write_text("".join(f"{line}\n" for line in sums))


@pytest.mark.parametrize(
    ("change", "changed", "kind", "words"),
    [
        (damaged, {}, CheckpointError, r"drafter\.json is damaged"),
        (of_another_target, {}, InputError, r"for a target of SHA-256 0{12}…, .* is [0-9a-f]{12}…; train one for it"),
        (None, {"drafter_sees": ("adapter",), "adapter": Path("a")}, ConfigError, "needs --adapter CKPT, and"),
        (None, {"target": "language_model"}, InputError, "drafts for a target that `demo build` made"),
        (of_another_target, {"drafter": "hybrid+{}"}, InputError, r"for a target of SHA-256 0{12}…, "),
        (None, {"drafter": "hybrid+{}/none"}, ConfigError, r"none is no folder that `demo draft` made; name one"),
        (None, {"drafter": "hybrid+ngram"}, ConfigError, r"ngram is no folder that `demo draft` made; name one"),
        (None, {"drafter": "ngram+{}"}, ConfigError, r"there is no drafter 'ngram\+.*there are: .*, hybrid\+FOLDER"),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused_before_a_model_is_loaded(
    target: Path,
    drafter: Path,
    prompts: Path,
    tmp_path: Path,
    change: Callable[[Path], None] | None,
    changed: dict[str, Any],
    kind: type[RayAppError],
    words: str,
) -> None:
    if change:
        change(drafter)
    if "drafter" in changed:
        changed = {"drafter": (changed["drafter"].format(drafter),)}
    if "target" in changed:
        changed = {"target": shutil.copytree(target / "language_model", tmp_path / "plain")}
    settings = {
        "source": (prompts,),
        "target": target,
        "out": tmp_path / "out",
        "drafter": (str(drafter),),
        **changed,
    }
    with pytest.raises(kind, match=words):
        plan_of(DecodeConfig(**settings))
