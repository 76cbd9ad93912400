"""An EAGLE head in `decode`: a folder of one target, live passes as they are counted, and the target's own texts."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_target
from small_drafting import exact_rows, head_that_knows, rows_in, some_head

from ray_app.commands.decode.command import plan_of, run_decode
from ray_app.commands.decode.compare import read_run
from ray_app.commands.demo.answers import TRAINING, pictures
from ray_app.commands.demo.decode import png
from ray_app.commands.demo.draft_training import (
    STATES,
    TRAIN,
    DraftRecipe,
    drafted_by_eagle,
    eagle_settings,
    write_draft_stores,
)
from ray_app.commands.demo.sight import MAX_NEW_TOKENS
from ray_app.config.decode import DecodeConfig
from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.draft_losses import GAMMA
from ray_app.errors import CheckpointError, ConfigError, InputError, RayAppError
from ray_app.language_models.drafter_folder import read_drafter, write_drafter
from ray_app.language_models.kinds import load
from ray_app.store.atomic import sha256_file

DRIVES, PER_DRIVE = 2, 2
RECIPE = DraftRecipe(drives=DRIVES, per_drive=PER_DRIVE)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, two heads, `one` that knows its answers and `two`, and prompts about the pictures of its answers."""
    folder = tmp_path_factory.mktemp("work")
    target = load(tiny_target.save_target(folder), "float32", "cpu")
    write_draft_stores(target, folder, RECIPE, 1, 0, lambda _: None, states=True)
    cfg = eagle_settings(RECIPE, folder, out=str(folder / "none"), language_model=folder / "language_model")
    layout, *_ = rows_in(folder / (TRAIN + STATES))
    write_drafter(folder / "one", [head_that_knows(cfg, exact_rows(folder))], layout, {"seed": 0})
    write_drafter(folder / "two", [some_head(cfg, noise=0.02)], layout, {"seed": 1})
    lines = []
    for number, each in enumerate(pictures(0, TRAINING, DRIVES, PER_DRIVE)):
        (folder / f"{number}.png").write_bytes(png(each.image_HWC))
        lines.append({"id": f"{number}", "sequence": each.sequence, "frames": [f"{number}.png"]})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def settings(work: Path, out: Path, *drafters: str, **changed: Any) -> DecodeConfig:
    values: dict[str, Any] = {
        "source": (work / "prompts.jsonl",),
        "target": work / "target",
        "out": out,
        "drafter": tuple(str(work / name) if (work / name).is_dir() else name for name in drafters),
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_speculative_tokens": GAMMA,
        "draft_length": "fixed",
        "dtype": "float32",
        "watch": True,
    }
    return DecodeConfig(**values | changed)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def passes_of(out: Path, name: str) -> list[int]:
    return [line["drafters"][name]["num_passes"] for line in lines_of(out)]


def test_live_passes_are_those_that_are_counted_next_to_others_and_after_an_interruption(
    work: Path, tmp_path: Path
) -> None:
    cfg = settings(work, tmp_path / "out", "one", "early_exit", "two", exit_layers=1)
    found = run_decode(cfg)["results"]
    assert all(each["texts_that_differ"] == 0 for each in found.values())
    target, rows_NT = load(work / "target", "float32", "cpu"), exact_rows(work)
    layout, *_ = rows_in(work / (TRAIN + STATES))
    live = {}
    for name in ("one", "two"):
        head = read_drafter(work / name, target)
        assert isinstance(head, EagleHead)
        counted = drafted_by_eagle(head, work / "language_model", layout, rows_NT)
        live[name] = passes_of(cfg.out, name)
        assert live[name] == counted.passes_N.tolist()
        assert [len(line["target_tokens"]) for line in lines_of(cfg.out)] == counted.tokens_N.tolist()
        for line in lines_of(cfg.out):
            assert line["drafters"][name]["own_tokens"][0] == line["target_tokens"][0]
            assert line["weight_bytes"][name] == sum(each.nbytes for each in head.parameters())
    assert live["one"] != live["two"]
    assert sum(live["one"]) < 0.8 * counted.tokens_N.sum(), "many drafts of it were accepted"
    run_decode(settings(work, tmp_path / "alone", "one", max_rows=2))
    assert passes_of(tmp_path / "alone", "one") == live["one"][:2]
    next((cfg.out / "shards").glob("*.sha256")).unlink()
    assert 0 < run_decode(cfg)["rows_kept"] < DRIVES * PER_DRIVE
    assert passes_of(cfg.out, "one") == live["one"]
    assert [read_run(cfg.out).baseline(name) for name in ("one", "two")] == [None, None]


def test_gamma_online_bfloat16_and_sampling_keep_the_targets_texts(work: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_rows": 2, "max_new_tokens": 24}
    online = settings(work, tmp_path / "online", "one", "hybrid", "two", draft_length="online", **few)
    assert all(each["texts_that_differ"] == 0 for each in run_decode(online)["results"].values())
    run_decode(settings(work, tmp_path / "half", "one", "two", dtype="bfloat16", **few))
    for line in lines_of(tmp_path / "half"):
        for way in line["drafters"].values():
            assert way.get("difference", {"rounding": True})["rounding"]
    run_decode(settings(work, tmp_path / "drawn", "one", "two", temperature=1.0, top_p=0.9, **few))
    for line in lines_of(tmp_path / "drawn"):
        for way in line["drafters"].values():
            assert way["passes"][0][2] >= 1, "the first token is drawn from the target's own distribution"


def no_more(folder: Path) -> None:
    (folder / "eagle_head.safetensors").write_bytes(b"")


def of_another_target(folder: Path) -> None:
    change(folder, "layout", "target", "0" * 64)


def called_otherwise(folder: Path) -> None:
    change(folder, "parts", "early_exit", {})


def change(folder: Path, key: str, name: str, value: Any) -> None:
    """Change drafter.json and its checksum."""
    path, sums = folder / "drafter.json", folder / "MANIFEST.sha256"
    document = json.loads(path.read_text(encoding="utf-8"))
    document[key][name] = value
    before = sha256_file(path)
    path.write_text(json.dumps(document), encoding="utf-8")
    sums.write_text(sums.read_text(encoding="utf-8").replace(before, sha256_file(path)), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "name", "sees", "kind", "words"),
    [
        (no_more, "{}", (), CheckpointError, r"eagle_head\.safetensors is damaged"),
        (called_otherwise, "{}", (), CheckpointError, r"no drafter has the parts \['eagle_head', 'early_exit'\]"),
        (of_another_target, "{}", (), InputError, r"of SHA-256 0{12}…, .* is [0-9a-f]{12}…; .* --kind eagle_head"),
        (
            None,
            "{}",
            ("nothing",),
            ConfigError,
            "is shown no picture; leave out --drafter-sees nothing",
        ),
        (None, "{}", ("events", "other"), ConfigError, "leave out --drafter-sees events other"),
        (
            None,
            "hybrid+{}",
            (),
            ConfigError,
            "EAGLE head, which is not mixed with hybrid; name both: --drafter",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused_before_a_model_is_loaded(
    work: Path, tmp_path: Path, damage: Any, name: str, sees: tuple[Any, ...], kind: type[RayAppError], words: str
) -> None:
    folder = tmp_path / "head"
    folder.mkdir()
    for file in (work / "two").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if damage:
        damage(folder)
    cfg = settings(work, tmp_path / "out", name.format(folder), drafter_sees=sees)
    with pytest.raises(kind, match=words):
        plan_of(cfg)
