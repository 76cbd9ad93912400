"""`capture`: what the models really say, the same after any kill, and lossless under every drafter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM, VideoLlavaForConditionalGeneration, VideoLlavaImageProcessor

from ray_app import cli, errors
from ray_app.commands.capture.capture_worker import CaptureActor
from ray_app.commands.capture.command import plan_of, run_capture, settings_of
from ray_app.commands.replay.command import run_replay
from ray_app.config.speculative import CaptureConfig, ReplayConfig
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.core.speculative.verification import verify_greedy
from ray_app.drafters.recorded_states import answers_with_states
from ray_app.drafters.replay import DRAFTERS
from ray_app.errors import InputError, ResourceError, StoreError
from ray_app.language_models.loading import tokenizer_difference
from ray_app.sources.clips import Clip, clip_windows, clips
from ray_app.store.capture_store import TRACES, Shard, claim_capture, read_shard
from ray_app.store.traces import read_traces

QUESTION = "What is there ?"
VOCABULARY = len(tiny_models.SPECIAL) + len(tiny_models.WORDS)
FRAMES, FPS = 44, 25.0

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.save_target(folder / "target")
    tiny_models.save_drafter(folder / "drafter")
    return folder


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of smooth noise that drifts."""
    folder = tmp_path_factory.mktemp("footage") / "drive"
    folder.mkdir()
    small = np.random.default_rng(0).integers(0, 255, (6, 40, 3), dtype=np.uint8)
    wide = np.asarray(Image.fromarray(small).resize((40 * 16, 48), Image.Resampling.BICUBIC))
    for n in range(FRAMES):
        Image.fromarray(wide[:, 12 * n : 12 * n + 64]).save(folder / f"{n:04d}.png")
    return folder


def config(models: Path, footage: Path, out: Path, **changed: object) -> CaptureConfig:
    settings: dict[str, object] = {
        "clips": (footage,),
        "target": models / "target",
        "drafter": models / "drafter",
        "out": out,
        "question": QUESTION,
        "duration": "320ms",
        "step": "40ms",
        "fps": FPS,
        "max_new_tokens": 14,
        "verify": (2, 4),
        "features": True,
    }
    return CaptureConfig(**{**settings, **changed})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def captured(models: Path, footage: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:  # noqa: ARG001
    """37 windows in three shards. Shared: copy it before changing it."""
    out = tmp_path_factory.mktemp("captured") / "out"
    result = run_capture(config(models, footage, out))
    assert (result["rows"], result["rows_kept"], result["shards"], result["rejected"]) == (37, 0, 3, 0)
    assert result["num_verified"] > 0
    assert result["num_verified_otherwise"] == 0
    assert {"draft_prefill", "draft_per_token", "target_prefill", "target_per_token"} < set(result["timing_ms"])
    return out


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / TRACES).read_text().splitlines()]


def spoken(out: Path) -> list[tuple]:
    return [(row["row"], row["draft_tokens"], row["target_tokens"]) for row in rows_of(out)]


def here(cfg: CaptureConfig) -> Shard:
    """The first shard, captured in this process."""
    plan = plan_of(cfg)
    claim_capture(cfg.out, settings_of(cfg))
    done = CaptureActor(cfg, plan, "cpu", 1)({"shard": plan[0][0]})
    if done["error"]:
        raise getattr(errors, done["kind"])(done["error"])
    shard = read_shard(cfg.out, plan[0][0])
    assert shard is not None
    return shard


def clip_of(footage: Path, row: int) -> Clip:
    windows = clip_windows([footage], duration_us=320_000, step_us=40_000, num_frames=8, fps=FPS)
    (clip,) = clips([windows[row]])
    assert isinstance(clip, Clip)
    return clip


class Target:
    """Video-LLaVA by hand: no processor, no cache, no generate."""

    def __init__(self, folder: Path, footage: Path, row: int) -> None:
        self.model = VideoLlavaForConditionalGeneration.from_pretrained(folder).eval()
        pictures = VideoLlavaImageProcessor.from_pretrained(folder)
        pixels = [
            pictures(Image.fromarray(frame), return_tensors="pt", return_legacy_image_output=False)["pixel_values"][0]
            for frame in clip_of(footage, row).frames_THWC
        ]
        self.pixels = torch.stack(pixels)[None]
        text = AutoTokenizer.from_pretrained(folder)
        video = [self.model.config.video_token_index] * (8 * 5)  # 2 x 2 patches and one more for each frame
        self.prompt = [*text("USER :")["input_ids"], *video, *text(f"{QUESTION} ASSISTANT :")["input_ids"]]

    @torch.inference_mode()
    def logits(self, said: list[int]) -> torch.Tensor:
        """What it thinks of each next token from the end of the prompt on, shape (1 + len(said), V)."""
        tokens = torch.tensor([[*self.prompt, *said]])
        found = self.model(input_ids=tokens, pixel_values_videos=self.pixels, use_cache=False).logits
        return found[0, len(self.prompt) - 1 :]


def test_the_recorded_answer_is_what_the_target_says_by_hand(models: Path, footage: Path, captured: Path) -> None:
    for row in (0, 20):
        target, said = Target(models / "target", footage, row), []
        while len(said) < 14 and said[-1:] != [2]:
            said.append(int(target.logits(said)[-1].argmax()))
        assert said == rows_of(captured)[row]["target_tokens"]


def test_the_recorded_draft_is_what_the_drafter_says_by_hand(models: Path, captured: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(models / "drafter").eval()
    prompt = AutoTokenizer.from_pretrained(models / "drafter")(f"USER: {QUESTION} ASSISTANT:")["input_ids"]
    said: list[int] = []
    with torch.inference_mode():
        while len(said) < 14 and said[-1:] != [2]:
            said.append(int(model(torch.tensor([[*prompt, *said]]), use_cache=False).logits[0, -1].argmax()))
    assert all(row["draft_tokens"] == said for row in rows_of(captured))  # it sees the question alone


def test_windows_differ_and_their_rows_tell_where_they_are_from(captured: Path) -> None:
    rows = rows_of(captured)
    assert [row["row"] for row in rows] == list(range(37))
    assert rows[3]["sequence"] == "drive"
    assert (rows[3]["t_start_us"], rows[3]["t_end_us"]) == (120_000, 440_000)
    assert len({tuple(row["target_tokens"]) for row in rows}) > 5  # the frames do reach the model
    times = rows[3]["timing_ms"]
    assert set(times["verify"]) == {"2", "4"}
    assert all(ms > 0 for ms in (*times["verify"].values(), times["target_prefill"], times["draft_per_token"]))


def test_states_are_what_each_token_was_chosen_from(models: Path, footage: Path, captured: Path) -> None:
    row = rows_of(captured)[5]
    states = load_file(captured / row["states"])
    state_TD = states["5.target"]
    assert state_TD.dtype == torch.bfloat16
    target = Target(models / "target", footage, 5)
    logits_TV = state_TD.float() @ target.model.get_output_embeddings().weight.T
    by_hand_TV = target.logits(row["target_tokens"][:-1])
    torch.testing.assert_close(logits_TV, by_hand_TV, atol=0.05 * float(by_hand_TV.abs().max()), rtol=0.0)
    assert states["5.draft"].shape == (len(row["draft_tokens"]), tiny_models.WIDTH)


@pytest.mark.parametrize("name", DRAFTERS)
def test_decoding_with_any_drafter_gives_the_recorded_answer(
    name: str, models: Path, footage: Path, captured: Path
) -> None:
    """The live target verifies drafts of a drafter that learnt from the other rows."""
    file = read_traces(captured / TRACES, VOCABULARY, 2)
    answered = answers_with_states(file, None)
    drafter = DRAFTERS[name]()
    drafter.fit([with_aligned(each) for each in answered[:30]])
    each = with_aligned(answered[31])
    drafter.update(each.prompt, answered[30].answer)
    target, said = Target(models / "target", footage, 31), list[int]()
    while said[-1:] != [2] and len(said) < len(each.answer):
        draft = list(drafter.draft(each.prompt, tuple(said), 4).tokens)
        choices = target.logits([*said, *draft])[len(said) :].argmax(dim=1).tolist()
        said += verify_greedy(draft, choices).tokens
    assert tuple(said[: len(each.answer)]) == each.answer


def with_aligned(each: AnsweredPrompt) -> AnsweredPrompt:
    """With the raw states in the place of aligned ones: both models are equally wide."""
    prompt = Prompt(
        each.prompt.question, each.prompt.event_tokens, each.prompt.event_states, each.prompt.event_states
    )
    return AnsweredPrompt(prompt, each.answer, each.target_states)


def test_replay_reads_what_capture_wrote(captured: Path) -> None:
    result = run_replay(
        ReplayConfig(
            traces=(captured / TRACES,),
            drafter=("hidden_state", "hybrid"),
            num_speculative_tokens=4,
            folds=3,
            fold_gap=2,
            vocabulary=VOCABULARY,
        )
    )
    assert result["rows"] == 37
    assert result["results"]["hidden_state"]["tokens_per_target_pass"] > 1.0
    assert result["results"]["hybrid"]["one_shot_speedup"] is not None
    short = sum("4" not in row["timing_ms"]["verify"] for row in rows_of(captured) if "timing_ms" in row)
    assert short > 0
    assert f"verify(4) was not measured in {short} of 37 rows" in " ".join(result.report.notes)


@pytest.mark.slow
def test_nothing_is_captured_twice_and_a_damaged_shard_alone_again(
    models: Path, footage: Path, captured: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    subprocess.run(["cp", "-r", captured, out], check=True)
    shards = out / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    again = run_capture(config(models, footage, out))
    assert (again["rows_kept"], again["workers"]) == (37, 0)
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    damaged = shards / "drive-0001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(InputError, match=r"drive-0001\.safetensors is missing or damaged"):
        run_replay(
            ReplayConfig(
                traces=(out / TRACES,), drafter=("hidden_state",), folds=2, fold_gap=2, vocabulary=VOCABULARY
            )
        )
    assert run_capture(config(models, footage, out))["rows_kept"] == 21
    assert spoken(out) == spoken(captured)
    assert load_file(damaged).keys() == load_file(captured / "shards" / damaged.name).keys()


@pytest.mark.slow
def test_a_killed_capture_resumes_where_it_was(models: Path, footage: Path, captured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cfg = config(models, footage, out)
    words = ["capture", str(footage), "--target", str(cfg.target), "--drafter", str(cfg.drafter), "--out", str(out)]
    words += ["--question", QUESTION, "--duration", "320ms", "--step", "40ms", "--fps", "25"]
    words += ["--max-new-tokens", "14", "--verify", "2", "4", "--features"]
    words += ["--address", ray.get_runtime_context().gcs_address]
    path = os.pathsep.join([str(Path(cli.__file__).parents[1]), str(Path(__file__).parents[1] / "helpers")])
    run = subprocess.Popen(
        [sys.executable, "-m", "ray_app", *words], env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 400
        while not any(out.glob("shards/*.sha256")):
            assert run.poll() is None, run.stderr.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert not (out / TRACES).exists()
    result = run_capture(cfg)
    assert 16 <= result["rows_kept"] < 37
    assert spoken(out) == spoken(captured)


@pytest.mark.slow
def test_a_window_without_a_frame_is_set_aside_until_it_is_there(models: Path, footage: Path, tmp_path: Path) -> None:
    broken = tmp_path / "drive"
    subprocess.run(["cp", "-r", footage, broken], check=True)
    for n in range(12, FRAMES):
        (broken / f"{n:04d}.png").unlink()
    good = (broken / "0009.png").read_bytes()
    (broken / "0009.png").write_bytes(good[:40])
    cfg = config(models, broken, tmp_path / "out", max_new_tokens=4, features=False)
    first = run_capture(cfg)
    assert (first["rows"], first["rejected"]) == (2, 3)
    shard = read_shard(cfg.out, plan_of(cfg)[0][0])
    assert shard is not None
    assert [row["row"] for row in shard.rows] == [0, 1]
    assert [line["position"].split(",")[0] for line in shard.rejected] == ["row 2", "row 3", "row 4"]
    assert "0009.png" in shard.rejected[0]["reason"]
    (broken / "0009.png").write_bytes(good)
    repaired = run_capture(cfg)
    assert (repaired["rows"], repaired["rows_kept"], repaired["rejected"]) == (5, 0, 0)


def test_another_tokenizer_is_translated_and_states_are_refused(models: Path, footage: Path, tmp_path: Path) -> None:
    other = tiny_models.save_drafter(tmp_path / "other", words=[*tiny_models.WORDS[::-1], "more"])
    one, two = (AutoTokenizer.from_pretrained(folder) for folder in (other, models / "target"))
    assert tokenizer_difference(one, two) == "token 'USER' is 59 in the one and 5 in the other"
    assert tokenizer_difference(two, two) is None
    short = {"drafter": other, "duration": "1600ms", "max_new_tokens": 6}
    with pytest.raises(InputError, match="--features needs a drafter and a target of one tokenizer"):
        here(config(models, footage, tmp_path / "a", **short))
    for row in here(config(models, footage, tmp_path / "b", features=False, **short)).rows:
        words = [word for word in row["draft_text"].split() if word != "more"]
        assert two.decode(row["draft_tokens"], skip_special_tokens=True).split() == words


def test_the_vision_model_may_draft_too(models: Path, footage: Path, tmp_path: Path) -> None:
    cfg = config(models, footage, tmp_path / "out", drafter=models / "target", duration="1600ms", max_new_tokens=6)
    assert all(row["draft_tokens"] == row["target_tokens"] for row in here(cfg).rows)


def test_what_the_user_can_fix(models: Path, footage: Path, captured: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds a capture of other max_new_tokens, question"):
        run_capture(config(models, footage, captured, question="Why ?", max_new_tokens=5))
    with pytest.raises(StoreError, match="already holds something else"):
        run_capture(config(models, footage, models))
    with pytest.raises(InputError, match="its config or tokenizer cannot be read"):
        run_capture(config(models, footage, tmp_path / "out", target=tmp_path))
    with pytest.raises(InputError, match="too short for a window of 9s"):
        run_capture(config(models, footage, tmp_path / "out", duration="9s"))
    with pytest.raises(ResourceError, match="1 replicas need 1 GPUs, the cluster has 0"):
        run_capture(config(models, footage, tmp_path / "gpu", use_gpu=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "EventChat_llama", "hidden_size": 64},
            "of a LlamaForCausalLM are missing or of another shape",
        ),
        ({"model_type": "mamba"}, "weights of a MambaForCausalLM are missing"),
        ({"model_type": "never heard of"}, "cannot be loaded as TextModel"),
    ],
)
def test_models_that_cannot_be_loaded_are_named(
    change: dict, message: str, models: Path, footage: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    subprocess.run(["cp", "-r", models / "drafter", wrong], check=True)
    path = wrong / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        here(config(models, footage, tmp_path / "out", drafter=wrong, duration="1600ms"))


def test_eventgpt_is_not_shown_frames(models: Path, footage: Path, tmp_path: Path) -> None:
    eventgpt = tmp_path / "eventgpt"
    subprocess.run(["cp", "-r", models / "drafter", eventgpt], check=True)
    path = eventgpt / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "EventChat_llama"}))
    with pytest.raises(InputError, match="EventGPT, which reads event images; capture shows frames"):
        run_capture(config(models, footage, tmp_path / "out", drafter=eventgpt))


def test_pickled_weights_are_refused(models: Path, footage: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    subprocess.run(["cp", "-r", models / "drafter", pickled], check=True)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="no weights in safetensors"):
        run_capture(config(models, footage, tmp_path / "out", drafter=pickled))


@pytest.mark.slow
def test_real_footage_through_the_command(
    models: Path, shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["capture", str(shared_data / "video" / "solidWhiteRight.mp4"), "--duration", "4s", "--step", "2s"]
    words += ["--target", str(models / "target"), "--drafter", str(models / "drafter"), "--max-new-tokens", "4"]
    assert cli.run([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["rows"] == 3
    assert f"--vocabulary {VOCABULARY} --end-token 2 --start-token 1" in result["replay"]
