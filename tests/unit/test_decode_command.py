"""`decode --watch`, which needs no Ray: what comes out, rejected rows, interruptions, and mistakes of the user."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import MistralConfig

from ray_app import cli
from ray_app.commands.decode import worker
from ray_app.commands.decode.command import run_decode
from ray_app.commands.decode.session import DecodeSession
from ray_app.config.decode import DecodeConfig
from ray_app.errors import ConfigError, InputError, RayAppError, ResourceError, StoreError
from ray_app.language_models.answers import answer
from ray_app.language_models.kinds import load
from ray_app.store.manifest import Features, FeatureSpec
from ray_app.store.pair_store import Pair, publish, write_part
from ray_app.store.traces import read_traces

VOCABULARY = len(tiny_models.SPECIAL) + len(tiny_models.WORDS)
REFERENCE_KEYS = [
    *("id", "split", "query", "event_data", "egpt", "egpt_time", "egpt_stage1_time", "egpt_stage2_time"),
    *("egpt_stage3_time", "egpt_token_ids", "video_data", "llava-1.5-7b-hf", "llava_time", "llava_stage1_time"),
    *("llava_stage2_time", "llava_stage3_time", "llava_token_ids", "egpt_memory_model_mb"),
    *("egpt_memory_inference_mb", "llava_memory_model_mb", "llava_memory_inference_mb"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_drafter(folder / "target", seed=0)
    tiny_models.save_drafter(folder / "small", seed=2)
    tiny_models.save_llava(folder / "llava")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 questions of 4 drives, three different ones."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [
        {"sequence": f"drive{n // 10}", "question": f"What is w{n % 3} ?", "draft_tokens": [20]} for n in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config(models: Path, prompts: Path, out: Path, **changed: Any) -> DecodeConfig:
    settings: dict[str, Any] = {
        "source": (prompts,),
        "target": models / "target",
        "drafter": ("hybrid", "previous_window"),
        "out": out,
        "num_speculative_tokens": 4,
        "max_new_tokens": 16,
        "draft_length": "fixed",
        "watch": True,
    }
    return DecodeConfig(**{**settings, **changed})


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def outcome(line: dict[str, Any]) -> dict[str, Any]:
    """All of a row that is not a time."""
    ways = {
        name: ([each[:4] for each in way["passes"]], way.get("tokens"), way["own_tokens"])
        for name, way in line["drafters"].items()
    }
    return {"row": line["row"], "sequence": line["sequence"], "tokens": line["target_tokens"], "ways": ways}


@pytest.fixture(scope="module")
def done(models: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("decoded") / "out"
    drafters = ("hybrid", "previous_window", "prompt_lookup", "early_exit", str(models / "small"))
    cfg = config(models, prompts, out, drafter=drafters, exit_layers=1, html=out.parent / "page.html")
    result = run_decode(cfg)
    assert (result["rows"], result["rejected"], result["sequences"]) == (40, 0, 4)
    assert {name: numbers["texts_that_differ"] for name, numbers in result["results"].items()} == dict.fromkeys(
        ("hybrid", "previous_window", "prompt_lookup", "early_exit", "small"), 0
    )
    return out


def test_the_text_of_every_row_is_what_the_target_says_by_itself(models: Path, done: Path) -> None:
    target = load(models / "target", "auto", "cpu")
    for line in lines_of(done)[:4]:
        said = answer(target, None, line["question"], max_new_tokens=16)
        assert (line["target_tokens"], line["target_text"]) == (said.tokens, said.text)
        assert all("tokens" not in way for way in line["drafters"].values())  # the same


def test_drafters_learn_from_earlier_rows_and_their_numbers_add_up(done: Path) -> None:
    results = json.loads((done / "results.json").read_text())["results"]
    assert results["hybrid"]["tokens_per_target_pass"] > 1.8
    assert results["previous_window"]["tokens_per_target_pass"] > 1.2
    tokens = sum(len(line["target_tokens"]) for line in lines_of(done))
    for name, numbers in results.items():
        assert numbers["tokens_per_target_pass"] == pytest.approx(tokens / numbers["num_drafts"])
        assert sum(numbers["num_accepted_tokens_per_pos"]) == numbers["num_accepted_tokens"]
        assert sum(numbers["stage_share"].values()) == pytest.approx(1.0)
        low, high = numbers["interval95"]["tokens_per_target_pass"]
        assert low <= numbers["tokens_per_target_pass"] <= high, name


def test_pieces_of_a_text_make_the_text(done: Path) -> None:
    for line in lines_of(done):
        for way in line["drafters"].values():
            assert "".join(drafted + own for drafted, own in way["pieces"]).strip() == line["target_text"]


def test_the_reference_s_keys_come_first_and_in_its_order(done: Path, shared_reference: Path) -> None:
    theirs = json.loads((shared_reference / "benchmark_results_S1.json").read_text())[0]
    assert list(theirs) == REFERENCE_KEYS
    rows = json.loads((done / "benchmark_results_S1.json").read_text())
    assert len(rows) == 40
    for row in rows:
        assert list(row)[: len(theirs)] == REFERENCE_KEYS
        assert all(isinstance(row[key], type(value)) for key, value in theirs.items())
        stages = row["llava_stage1_time"] + row["llava_stage2_time"] + row["llava_stage3_time"]
        assert stages == pytest.approx(row["llava_time"])


def test_traces_are_what_replay_reads(done: Path) -> None:
    for name in ("hybrid", "small"):
        file = read_traces(done / "traces" / f"{name}.jsonl", VOCABULARY, 2)
        assert (len(file.traces), file.rejected) == (40, ())
        assert file.traces[3].draft_tokens == [20]
        assert file.traces[3].timing_ms is not None
    assert file.traces[3].timing_ms.draft_prefill is not None  # of the drafter that is a model


def test_the_page_shows_every_drafter_with_its_accepted_tokens(done: Path) -> None:
    page = (done.parent / "page.html").read_text()
    assert "24 of 40 rows" in page
    assert '<b class="good">' in page
    assert all(name in page for name in ("hybrid", "early_exit", "small"))


def test_an_interrupted_run_resumes_where_it_was(
    models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_decode(config(models, prompts, whole))
    decode_row, decoded = DecodeSession.decode, []

    def sometimes_killed(self: DecodeSession, row: Any, *rest: Any) -> dict[str, Any]:
        if len(decoded) in (7, 23, 24):
            decoded.append(None)
            raise KeyboardInterrupt
        decoded.append(row.row)
        return decode_row(self, row, *rest)

    monkeypatch.setattr(DecodeSession, "decode", sometimes_killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_decode(config(models, prompts, parts))
    result = run_decode(config(models, prompts, parts))
    assert result["rows"] == 40
    assert 0 < result["rows_kept"] < 40
    assert [outcome(line) for line in lines_of(parts)] == [outcome(line) for line in lines_of(whole)]
    again = run_decode(config(models, prompts, parts))
    assert (again["rows"], again["rows_kept"]) == (40, 40)


def test_sampled_texts_depend_on_the_seed_and_the_row_alone(models: Path, prompts: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "temperature": 1.5,
        "top_p": 0.9,
        "max_rows": 3,
        "drafter": (str(models / "small"), "early_exit"),
    }
    runs = [
        run_decode(config(models, prompts, tmp_path / name, exit_layers=1, seed=seed, **how))
        and lines_of(tmp_path / name)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    texts = [[(line["target_tokens"], outcome(line)["ways"]) for line in run] for run in runs]
    assert texts[0] == texts[1] != texts[2]
    assert json.loads((tmp_path / "a" / "results.json").read_text())["results"]["small"]["texts_that_differ"] is None
    with pytest.raises(InputError, match=r"the target was sampled \(temperature 1.5\)"):
        read_traces(tmp_path / "a" / "traces" / "small.jsonl", VOCABULARY, 2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six prompts of two drives with frames and event images; one frame is damaged."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for n in range(6):
        for kind in ("frame", "events"):
            pixels = np.random.default_rng([n, len(kind)]).integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{kind}{n}.png")
        lines.append({"sequence": f"drive{n // 3}", "frames": [f"frame{n}.png"], "events": [f"events{n}.png"]})
    (folder / "frame4.png").write_bytes(b"no picture")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "prompts.jsonl"


def test_a_drafter_that_sees_is_measured_with_every_picture_and_a_bad_row_is_rejected_alone(
    models: Path, pictures: Path, tmp_path: Path
) -> None:
    sees = ("events", "frames", "constant", "other", "nothing")
    cfg = config(models, pictures, tmp_path / "out", target=models / "llava", drafter=(str(models / "llava"),))
    result = run_decode(cfg.model_copy(update={"drafter_sees": sees}))
    assert (result["rows"], result["rejected"]) == (4, 2)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in rejected] == [1, 4]
    assert "--drafter-sees other takes the pictures of row 4, and " in rejected[0]["reason"]
    assert "frame4.png is no readable image" in rejected[1]["reason"]
    rates = {name: numbers["draft_acceptance_rate"] for name, numbers in result["results"].items()}
    assert list(rates) == [f"llava-{kind}" for kind in sees]
    assert rates["llava-frames"] == 1.0  # the target itself, shown the same
    assert all(rate < 1.0 for name, rate in rates.items() if name != "llava-frames")
    assert all(numbers["texts_that_differ"] == 0 for numbers in result["results"].values())
    tokens = {tuple(line["target_tokens"]) for line in lines_of(tmp_path / "out")}
    assert len(tokens) > 1  # frames reach the target


def test_a_store_of_pictures_is_decoded_drive_by_drive(models: Path, tmp_path: Path) -> None:
    spec = FeatureSpec(dtype="uint8", shape=(3, 28, 28), scale=1 / 255)
    rng, size = np.random.default_rng(0), spec.num_bytes
    pairs = [Pair(f"drive{n % 2}", n * 10**6, (n + 1) * 10**6, rng.bytes(size), rng.bytes(size)) for n in range(6)]
    features = Features(event=spec, target=spec)
    record = write_part(tmp_path / "store", "part-0", pairs, features)
    publish(
        tmp_path / "store",
        [record],
        features=features,
        durations={"1s": 10**6},
        source={"name": "made"},
        rejected=b"",
    )
    result = run_decode(config(models, tmp_path / "store", tmp_path / "out", target=models / "llava"))
    assert result["rows"] == 6
    assert [line["sequence"] for line in lines_of(tmp_path / "out")] == ["drive0"] * 3 + ["drive1"] * 3
    with pytest.raises(StoreError, match="has no windows of 2s"):
        run_decode(config(models, tmp_path / "store", tmp_path / "two", target=models / "llava", duration="2s"))


def test_in_bfloat16_each_difference_is_shown_with_both_logits(models: Path, prompts: Path, tmp_path: Path) -> None:
    """A target that is changed while it decodes: the difference is real, and is called a defect."""
    cfg = config(models, prompts, tmp_path / "out", max_rows=3, drafter=("prompt_lookup",), dtype="bfloat16")
    result = run_decode(cfg)
    for each in result["results"]["prompt_lookup"]["differences"]:
        assert each["rounding"], each
    session = DecodeSession(cfg, [], "cpu")
    asked = session.target.prompt(None, "What is w1 ?")
    prefix_PD = session.target.prefix(asked)
    plain = answer(session.target, None, "What is w1 ?", max_new_tokens=8).tokens
    place = min(3, len(plain) - 1)  # rounding, which processors differ in, decides how long the answer is
    other = [*plain[:place], (plain[place] + 7) % VOCABULARY, *plain[place + 1 :]]
    shown = session._difference(prefix_PD, plain, other)
    assert (shown.place, shown.plain_token, shown.token) == (place, plain[place], other[place])
    assert shown.plain_logits[0] > shown.plain_logits[1]
    assert not shown.rounding


def wrong_line(folder: Path, line: dict[str, Any] | str) -> Path:
    path = folder / f"wrong{len(list(folder.iterdir()))}.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    return path


def test_mistakes_of_the_user_are_named_before_a_model_is_loaded(
    models: Path, prompts: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(worker, "DecodeSession", never)
    out = tmp_path / "out"
    for changed, kind, message in (
        (
            {"drafter": ("magic",)},
            ConfigError,
            "there is no drafter 'magic', nor a folder of that name; there are: early",
        ),
        (
            {"drafter": ("ngram",)},
            ConfigError,
            "'ngram' drafts from the answers of other drives only; give --learn-from",
        ),
        ({"drafter": ("hidden_state",)}, ConfigError, "needs captured states; only `replay` has those"),
        (
            {"drafter": (str(models / "small"),), "drafter_sees": ("events",)},
            InputError,
            "small sees no pictures; leave",
        ),
        ({"drafter_sees": ("other",), "source": (wrong_line(tmp_path, {}),)}, ConfigError, "a source of two drives"),
        (
            {"source": (wrong_line(tmp_path, {"frame": "x.png"}),)},
            InputError,
            r"wrong\d.jsonl, line 1: frame: extra inputs",
        ),
        ({"source": (wrong_line(tmp_path, "{"),)}, InputError, r"wrong\d.jsonl, line 1: the line: invalid json"),
        ({"source": (wrong_line(tmp_path, ""),)}, InputError, "has no prompt; write a JSON object on each line"),
        ({"source": (tmp_path / "none.jsonl",)}, InputError, "none.jsonl cannot be read"),
        ({"source": (prompts, prompts)}, ConfigError, "one store or one file of prompts; 2 were given"),
        ({"target": tmp_path}, InputError, "its config or tokenizer cannot be read"),
        ({"learn_from": (tmp_path / "none.jsonl",)}, InputError, "none.jsonl cannot be read"),
        ({"html": tmp_path / "page.pdf"}, ConfigError, "end its name in .html"),
        ({"out": models}, StoreError, "already holds something else"),
        (
            {"out": done, "question": "Why ?"},
            StoreError,
            "holds a decode of other drafter, exit_layers, models, question",
        ),
    ):
        with pytest.raises(kind, match=message):  # type: ignore[call-overload]
            run_decode(config(models, prompts, **{"out": out, **changed}))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--num-speculative-tokens", "0", "greater than or equal to 1"),
        ("--temperature", "-1", "greater than or equal to 0"),
        ("--top-p", "0", "top-p"),
        ("--max-new-tokens", "1", "greater than or equal to 2"),
    ],
)
def test_settings_out_of_range_are_refused(
    flag: str,
    value: str,
    message: str,
    models: Path,
    prompts: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ["decode", str(prompts), "--target", str(models / "target"), "--out", str(tmp_path / "out"), flag, value]
    assert cli.run(words) == 2
    assert message in capfd.readouterr().err.replace("\n", " ")


def test_models_that_cannot_decode_together_are_named(models: Path, prompts: Path, tmp_path: Path) -> None:
    words = [*tiny_models.WORDS[:4], "other", *tiny_models.WORDS[4:]]
    foreign = tiny_models.save_drafter(tmp_path / "foreign", words=words)
    sliding = tiny_models.save_causal(
        tmp_path / "sliding",
        MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            sliding_window=8,
            bos_token_id=1,
            eos_token_id=2,
        ),
    )
    out = tmp_path / "out"
    changes: list[tuple[dict[str, Any], type[RayAppError], str]] = [
        (
            {"drafter": (str(foreign),)},
            InputError,
            "tokenizers differ .token 'is' is 10 in the one and 9 in the other",
        ),
        ({"target": sliding}, InputError, "sliding .mistral. keeps sliding windows in its cache"),
        ({"drafter": (str(sliding),)}, InputError, "sliding .mistral. keeps sliding windows in its cache"),
        (
            {"drafter": ("early_exit",), "exit_layers": 2},
            InputError,
            "after 2 layers: .*target has 2 layers; take fewer",
        ),
        ({"drafter": ("hybrid", "hybrid")}, ConfigError, "two drafters are called hybrid"),
        ({"max_new_tokens": 250}, InputError, "answer of up to 250 tokens outgrow .*target, which reads 256"),
    ]
    for number, (changed, kind, message) in enumerate(changes):
        with pytest.raises(kind, match=message):
            run_decode(config(models, prompts, out / str(number), **changed))


def test_pictures_for_a_target_that_sees_none_are_an_error_until_they_are_left_out(
    models: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="sees no pictures, and the row has 1; add --target-sees nothing"):
        run_decode(config(models, pictures, tmp_path / "a"))
    assert run_decode(config(models, pictures, tmp_path / "b", target_sees="nothing"))["rows"] == 5


def test_an_end_that_never_comes_is_said_with_the_limit(
    models: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["decode", str(prompts), "--target", str(models / "target"), "--out", str(tmp_path / "out"), "--watch"]
    assert cli.run([*words, "--max-new-tokens", "3", "--max-rows", "4"]) == 0
    text = capsys.readouterr().out.replace("\n", " ")
    assert re.search(r"\d answers have no end token: they were cut at --max-new-tokens \(3\)", text)


def test_a_gpu_without_memory_says_what_to_lower(
    models: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("ray_app.language_models.model.Context.prefill", full)
    with pytest.raises(
        ResourceError, match=r"\(CUDA out of memory. Tried to allocate 2 GiB.\); lower --num-frames, "
    ):
        run_decode(config(models, prompts, tmp_path / "out"))
