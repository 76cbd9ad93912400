"""`compare` of runs of `decode`: the same rows, every baseline in the table, and gains by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from pages import assert_has_words, assert_light_and_dark, assert_self_contained
from PIL import Image

from ray_app import cli
from ray_app.commands.compare import run_compare
from ray_app.commands.decode.command import run_decode
from ray_app.commands.decode.compare import DecodeRun
from ray_app.config.decode import DecodeConfig
from ray_app.config.evaluate import CompareConfig
from ray_app.errors import ConfigError, InputError, RayAppError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts of two drives with pictures, and runs `a`, `b` and `sees`."""
    here = tmp_path_factory.mktemp("compare")
    tiny_models.save_drafter(here / "target", seed=0)
    tiny_models.save_drafter(here / "small", seed=2)
    tiny_models.save_llava(here / "llava")
    lines = []
    for n in range(12):
        for kind in ("frame", "events"):
            pixels = np.random.default_rng([n, len(kind)]).integers(0, 255, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(here / f"{kind}{n}.png")
        pictures = {"frames": [f"frame{n}.png"], "events": [f"events{n}.png"]}
        lines.append({"id": str(n), "sequence": f"drive{n // 6}", "question": f"What is w{n % 3} ?", **pictures})
    (here / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    decode(here, "a", drafter=("hybrid", str(here / "small")))
    decode(here, "b", drafter=("previous_window", "hybrid"), max_rows=9)
    sees = ("events", "constant", "other", "nothing")
    decode(here, "sees", target=here / "llava", drafter=(str(here / "llava"),), drafter_sees=sees, max_rows=8)
    return here


def decode(here: Path, name: str, **changed: Any) -> Path:
    settings: dict[str, Any] = {
        "source": (here / "prompts.jsonl",),
        "target": here / "target",
        "target_sees": "frames" if "target" in changed else "nothing",
        "out": here / name,
        "num_speculative_tokens": 4,
        "max_new_tokens": 12,
        "draft_length": "fixed",
        "watch": True,
    }
    run_decode(DecodeConfig(**{**settings, **changed}))
    return here / name


def compare(here: Path, *names: str) -> dict[str, Any]:
    return run_compare(CompareConfig(checkpoints=tuple(str(here / name) for name in names), out=here / "compared"))


def test_drafters_of_two_runs_are_set_against_the_best_baseline_on_the_rows_of_both(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(folder / "a"), str(folder / "b"), "--out", str(folder / "compared")]
    assert cli.run(words) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / "compared" / "comparison.json").read_text(encoding="utf-8"))
    assert (result["rows"], result["sequences"]) == (9, 2)
    drafters = result["drafters"]
    assert {name: each["baseline"] for name, each in drafters.items()} == {
        "hybrid (a)": "hybrid",
        "hybrid (b)": "hybrid",
        "small": "nothing",
        "previous_window": None,
    }
    lines = [json.loads(line) for line in (folder / "b" / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = sum(len(line["target_tokens"]) for line in lines)
    rate = tokens / sum(line["drafters"]["previous_window"]["num_passes"] for line in lines)
    baselines = [each["tokens_per_target_pass"] for each in drafters.values() if each["baseline"]]
    gain = drafters["previous_window"]["gain"]["tokens_per_target_pass"]
    assert gain["difference"] == pytest.approx(rate - max(baselines))
    assert gain["interval95"][0] <= gain["difference"] <= gain["interval95"][1]
    assert result["baselines_missing"] == ["constant", "other", "ngram"]
    page = (folder / "compared" / "comparison.html").read_text(encoding="utf-8")
    for check in (assert_self_contained, assert_light_and_dark, assert_has_words):
        check(page)
    for text in (printed, page):
        assert "Not measured: a constant picture. Decode the same rows with --drafter DIR --drafter-sees " in text


def test_a_model_is_the_baseline_that_its_picture_makes_it(folder: Path) -> None:
    result = compare(folder, "sees")
    assert {name: each["baseline"] for name, each in result["drafters"].items()} == {
        "llava-events": None,
        "llava-constant": "constant",
        "llava-other": "other",
        "llava-nothing": "nothing",
    }
    assert result["baselines_missing"] == ["ngram", "hybrid"]
    assert result["verdict"].startswith("llava-events drafts ")


def test_runs_that_cannot_be_compared_are_named(folder: Path) -> None:
    decode(folder, "longer", drafter=("hybrid",), max_new_tokens=13)
    unfinished = decode(folder, "unfinished", drafter=("hybrid",), max_rows=2)
    (unfinished / "results.json").unlink()
    damaged = decode(folder, "damaged", drafter=("hybrid",), max_rows=2)
    shard = damaged / "shards" / "0000000.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"hybrid", b"hybrad"))
    errors: tuple[tuple[tuple[str, ...], type[RayAppError], str], ...] = (
        (("a", "longer"), InputError, "a and longer were decoded with other max_new_tokens; "),
        (("a", "sees"), InputError, "a and sees were decoded with other target, target_sees; "),
        (("a", "unfinished"), InputError, "unfinished is not finished: it has no results.json"),
        (("damaged",), InputError, r"0000000.sha256 does not hold; repeat the `ray-app decode` that wrote it"),
        (("a", "target"), ConfigError, "a is such a run, .*target is not"),
        (("target",), ConfigError, "compare needs --store STORE"),
    )
    for names, kind, message in errors:
        with pytest.raises(kind, match=message):
            compare(folder, *names)


def test_runs_whose_target_said_something_else_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = decode(folder, "other", drafter=("hybrid",), max_rows=3)
    monkeypatch.setattr(
        "ray_app.commands.decode.compare.read_shard", lambda at, name: _changed(at, name, at.name == other.name)
    )
    with pytest.raises(InputError, match="row 0: the target's own answers differ between the runs, as rounding"):
        compare(folder, "a", "other")


def _changed(at: Path, name: str, change: bool) -> Any:
    from ray_app.store.capture_store import Shard, read_shard

    shard = read_shard(at, name)
    assert shard
    return Shard([{**row, "target_tokens": [5]} for row in shard.rows], []) if change else shard


@pytest.mark.parametrize(
    ("file", "sees", "drafter", "baseline"),
    [
        ("event_tokens.safetensors", [], "small", None),
        ("event_tokens.safetensors", ["nothing"], "small", "nothing"),
        ("event_tokens.safetensors", ["events", "nothing"], "small-events", None),
        ("event_tokens.safetensors", ["events", "nothing"], "small-nothing", "nothing"),
        ("eagle_head.safetensors", [], "small", None),
        ("model.safetensors", [], "small", "nothing"),
        ("model.safetensors", [], "hybrid+small", None),
        ("model.safetensors", [], "hybrid", "hybrid"),
    ],
)
def test_what_a_drafter_was_shown_decides_which_baseline_it_is(
    file: str, sees: list[str], drafter: str, baseline: str | None
) -> None:
    settings = {"drafter": ["/models/small"], "drafter_sees": sees, "models": {"/models/small": {file: "0"}}}
    assert DecodeRun("run", settings, {}).baseline(drafter) == baseline
