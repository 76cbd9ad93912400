"""Live speculative decoding with SmolLM2-135M on the clock, one thread, next to plain decoding of the same rows.

    python -m benchmarks.speculative.decode SMOLLM2 ../shared/data/tokens/dsec_test_1s*.jsonl

Prompts: each asks to rewrite what a 7B model said about a second of a real drive; following windows overlap by half,
so that answers resemble those before. The first rows are learnt from, the next ones are decoded. Times are ratios
within one run: the ways to decode a row take turns. With --scratch FOLDER a repeated command keeps the rows that are
decoded, and --rows 4 is a quick look that is not saved. Writes benchmarks/results/decode.json.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.provenance import require_commit, save
from ray_app.commands.decode.command import DecodePlan, plan_of
from ray_app.commands.decode.files import ROWS, file_name, trace
from ray_app.commands.decode.summary import plain_summary, summarise
from ray_app.commands.decode.worker import decode_lane
from ray_app.commands.replay.rows import replayed_row
from ray_app.config.decode import DecodeConfig
from ray_app.config.speculative import ReplayConfig
from ray_app.core.speculative.decoding import Sampled
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.core.speculative.verification import verify_sampled
from ray_app.drafters.base import Draft, Drafter
from ray_app.drafters.replay import DRAFTERS, replay_rows
from ray_app.language_models.drafting import EarlyExit
from ray_app.language_models.kinds import load
from ray_app.language_models.loading import transformers
from ray_app.store.atomic import write_file
from ray_app.store.capture_store import as_lines, read_shard
from ray_app.store.traces import Trace

ASKED = "Rewrite in one short sentence: {}"
LONGEST = 240
"""Characters of a text that are put into a prompt."""
NUM_LEARN, NUM_FP32, NUM_BF16, NUM_WORST = 40, 200, 100, 40
GAMMA = 6
MAX_NEW_TOKENS = 24
DRAWS = 100_000
EXIT_LAYERS = 15
LEAST_EXPECTED = 5
KILL_ROWS, KILLS = 1000, 5
MOST_OVERHEAD, LEAST_BF16, LEAST_WORST, REPLAY_TOLERANCE = 0.05, 1.5, 0.97, 0.05


class WrongDrafter(Drafter):
    """A drafter that is always wrong: a token that no answer has."""

    name = "wrong"

    def draft(self, prompt: Prompt, accepted: Sequence[int], num_tokens: int) -> Draft:  # noqa: ARG002
        return Draft((1,) * num_tokens)


def main() -> None:
    """Run every part and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--rows", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    DRAFTERS["wrong"] = WrongDrafter
    with tempfile.TemporaryDirectory() as folder:
        scratch = asked.scratch or Path(folder)
        prompts = write_prompts(asked.texts, scratch, asked.rows)
        learnt = decoded(asked.target, prompts["learn"], scratch / "learn", drafter=("previous_window",))
        traces = scratch / "learn.jsonl"
        cfg = learnt[0].cfg
        write_file(traces, as_lines([trace(cfg, line, "previous_window") for line in learnt[1]]))
        fixed = decoded(
            asked.target,
            prompts["fp32"],
            scratch / "fp32",
            drafter=("hybrid", "ngram", "previous_window", "prompt_lookup", "early_exit"),
            learn_from=(traces,),
            draft_length="fixed",
        )
        bf16 = decoded(
            asked.target,
            prompts["bf16"],
            scratch / "bf16",
            drafter=("hybrid", "ngram", "previous_window"),
            learn_from=(traces,),
            dtype="bfloat16",
        )
        worst = decoded(asked.target, prompts["worst"], scratch / "worst", drafter=("wrong",), dtype="bfloat16")
        kills = kill_and_resume(asked.target, scratch)
    results = {name: numbers_of(*run) for name, run in (("fp32", fixed), ("bf16", bf16), ("worst", worst))}
    names = list(results["fp32"]["drafters"])
    overhead = max(
        numbers["drafters"][name]["loop_overhead"] for numbers in results.values() for name in numbers["drafters"]
    )
    best = max(results["bf16"]["drafters"][name]["speedup"] for name in ("hybrid", "ngram"))
    # Of drafters that need EventGPT's tokens the prompts have none, and replay has no time of EventGPT.
    rules = [name for name in names if name in DRAFTERS and not DRAFTERS[name].needs_event_tokens]
    predicted = {name: against_replay(*fixed, name) for name in rules}
    squares = chi_square(asked.target)
    worst_speed = results["worst"]["drafters"]["wrong"]["speedup"]
    differing = sum(results["fp32"]["drafters"][name]["texts_that_differ"] for name in names)
    rejected = sum(each["rejected"] for each in squares.values())
    lost = kills["rows_twice"] + kills["rows_that_differ"] + abs(kills["rows"] - KILL_ROWS)
    clock_error = max(abs(each["clock_error"]) for each in predicted.values())
    result = {
        "num_speculative_tokens": GAMMA,
        "max_new_tokens": MAX_NEW_TOKENS,
        **results,
        "replay": predicted,
        "chi_square": squares,
        "kills": kills,
        "limits": {
            "texts_that_differ": limit(differing, 0, differing == 0),
            "chi_square": limit(rejected, 0, rejected == 0),
            "loop_overhead": limit(overhead, MOST_OVERHEAD, overhead <= MOST_OVERHEAD),
            "bf16_speedup": limit(best, LEAST_BF16, best >= LEAST_BF16),
            "worst_case": limit(worst_speed, LEAST_WORST, worst_speed >= LEAST_WORST),
            "replay_error": limit(clock_error, REPLAY_TOLERANCE, clock_error <= REPLAY_TOLERANCE),
            "rows_after_kills": limit(lost, 0, lost == 0),
        },
    }
    if asked.rows:
        print(json.dumps(result, indent=1))
    else:
        save("decode", result)


def limit(found: float, limit: float, held: bool) -> dict[str, Any]:
    """Return a number with its limit."""
    return {"limit": limit, "found": found, "held": held}


def write_prompts(texts: Path, scratch: Path, most: int) -> dict[str, Path]:
    """Write the prompts of each part, at most so many if not 0; rows of one part are neighbours in time."""
    said = [json.loads(line)["target_text"] for line in texts.read_text().splitlines()]
    parts = {"learn": (0, NUM_LEARN), "fp32": (NUM_LEARN, NUM_LEARN + NUM_FP32)}
    first = NUM_LEARN + NUM_FP32
    parts |= {"bf16": (first, first + NUM_BF16), "worst": (first + NUM_BF16, first + NUM_BF16 + NUM_WORST)}
    files = {}
    for name, (low, high) in parts.items():
        files[name] = scratch / f"{name}.jsonl"
        lines = [{"question": ASKED.format(text[:LONGEST])} for text in said[low:high]]
        assert len(lines) == high - low, f"{texts} has {len(said)} rows"
        scratch.mkdir(parents=True, exist_ok=True)
        write_file(files[name], as_lines(lines[: most or None]))
    return files


def decoded(target: Path, prompts: Path, out: Path, **changed: Any) -> tuple[DecodePlan, list[dict[str, Any]]]:
    """Return the plan and the rows of a run in this process."""
    settings: dict[str, Any] = {"draft_length": "online", "dtype": "float32", "exit_layers": 2} | changed
    cfg = DecodeConfig(
        source=(prompts,),
        target=target,
        out=out,
        num_speculative_tokens=GAMMA,
        max_new_tokens=MAX_NEW_TOKENS,
        **settings,
    )
    plan = plan_of(cfg)
    began = time.perf_counter()
    decode_lane(plan.cfg, plan.data, plan.shards, plan.answered, "cpu")
    print(f"{prompts.stem}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    lines = [row for shard in plan.shards for row in shard_rows(out, shard.name)]
    return plan, [dict(line) for line in lines]


def shard_rows(out: Path, name: str) -> Sequence[Any]:
    """Return the rows of a shard that was just written."""
    shard = read_shard(out, name)
    assert shard is not None
    assert not shard.rejected, shard.rejected
    return shard.rows


def numbers_of(plan: DecodePlan, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a run."""
    return {
        "rows": len(lines),
        "dtype": plan.cfg.dtype,
        "draft_length": plan.cfg.draft_length,
        "plain": plain_summary(lines),
        "drafters": {name: summarise(lines, name, np.random.default_rng(0)) for name in lines[0]["drafters"]},
    }


def against_replay(plan: DecodePlan, lines: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Replay a run's traces: tokens per target pass exactly, and the predicted clock against the measured one."""
    cfg = ReplayConfig(
        traces=(Path(f"{file_name(name)}.jsonl"),),
        num_speculative_tokens=GAMMA,
        folds=1,
        vocabulary=10**6,
    )
    traces = [Trace.model_validate(json.loads(json.dumps(trace(plan.cfg, line, name)))) for line in lines]
    drafter = DRAFTERS[name]()
    drafter.fit(plan.answered)
    answered = [AnsweredPrompt(each.prompt, tuple(each.target_tokens)) for each in traces]
    rows = replay_rows(drafter, answered, gamma=GAMMA, vocabulary=10**6, clock=time.perf_counter)
    costs = [
        replayed_row(cfg, name, each, row, each.timing_ms, 0, 0).cost for each, row in zip(traces, rows, strict=True)
    ]
    predicted = sum(cost.plain_ms for cost in costs if cost) / sum(cost.continuous_ms for cost in costs if cost)
    plain_ms = sum(line["plain"]["total_ms"] for line in lines)
    measured = plain_ms / sum(line["drafters"][name]["total_ms"] for line in lines)
    return {
        "passes_predicted": sum(len(row.drafted) for row in rows),
        "passes_measured": sum(line["drafters"][name]["num_passes"] for line in lines),
        "rows_with_other_passes": sum(
            len(row.drafted) != line["drafters"][name]["num_passes"] for row, line in zip(rows, lines, strict=True)
        ),
        "speedup_predicted": predicted,
        "speedup_measured": measured,
        "clock_error": predicted / measured - 1.0,
    }


def chi_square(folder: Path) -> dict[str, Any]:
    """Draw one position many times at temperature 1, verifying a draft each time, against the target's softmax."""
    model = load(folder, "float32", "cpu")
    context = model.context()
    prefix_PD = model.prefix(model.prompt(None, "What do you see on a road at night?"))
    rng = np.random.default_rng(0)
    sampled = Sampled(1.0, 1.0, rng)
    p_2V = np.repeat(sampled.probabilities(context.prefill(prefix_PD)), 2, axis=0)
    early = EarlyExit(model, EXIT_LAYERS, range(model.vocabulary_size))
    with torch.inference_mode():
        logits_1V = early.logits(early.cache(context, 1), inputs_embeds=prefix_PD[None, -1:])
    likeliest_1V = np.zeros((1, p_2V.shape[1]))
    likeliest_1V[0, p_2V[0].argmax()] = 1.0
    drafts = {
        f"drawn from the first {EXIT_LAYERS} layers": sampled.probabilities(logits_1V),
        "always the likeliest token": likeliest_1V,
    }
    found: dict[str, Any] = {}
    for name, q_1V in drafts.items():
        counts, accepted = np.zeros(p_2V.shape[1]), 0
        for token in rng.choice(p_2V.shape[1], DRAWS, p=q_1V[0]).tolist():
            verified = verify_sampled((token,), q_1V, p_2V, rng)
            counts[verified.tokens[0]] += 1
            accepted += verified.num_accepted
        expected = DRAWS * p_2V[0]
        likely = expected >= LEAST_EXPECTED
        seen, wanted = (np.append(each[likely], each[~likely].sum()) for each in (counts, expected))
        freedom = len(seen) - 1
        statistic = float(((seen - wanted) ** 2 / wanted).sum())
        # The 1 % point of chi-square by Wilson and Hilferty.
        limit = float(freedom * (1 - 2 / (9 * freedom) + 2.326 * np.sqrt(2 / (9 * freedom))) ** 3)
        found[name] = {
            "draws": DRAWS,
            "accepted": accepted / DRAWS,
            "statistic": statistic,
            "degrees_of_freedom": freedom,
            "limit_1_percent": limit,
            "rejected": statistic > limit,
        }
    return found


def kill_and_resume(target: Path, scratch: Path) -> dict[str, Any]:
    """Kill a run of a tiny random model at random moments, resume it, and compare it with an undisturbed one."""
    tiny, prompts = scratch / "tiny", scratch / "many.jsonl"
    for name in ("tiny", "whole", "killed"):  # of an earlier run in the same folder
        shutil.rmtree(scratch / name, ignore_errors=True)
    hf = transformers()
    tokenizer = hf.AutoTokenizer.from_pretrained(target, local_files_only=True)
    config = hf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    write_file(
        prompts, as_lines([{"sequence": f"drive{n // 50}", "question": f"{n % 7}?"} for n in range(KILL_ROWS)])
    )
    words = [sys.executable, "-m", "ray_app", "decode", str(prompts), "--target", str(tiny), "--watch"]
    words += ["--max-new-tokens", "8", "--draft-length", "fixed", "--num-speculative-tokens", "3", "--out"]
    whole, killed = scratch / "whole", scratch / "killed"
    subprocess.run([*words, str(whole)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    moments = sorted(random.Random(0).sample(range(1, KILL_ROWS // 16), KILLS))
    for moment in moments:
        run = subprocess.Popen([*words, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(killed.glob("shards/*.sha256"))) < moment:
            if run.poll() is not None:
                raise SystemExit(f"the run ended with {run.returncode} before it was killed")
            time.sleep(0.01)
        run.kill()
        run.wait()
    subprocess.run([*words, str(killed)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows, same = (
        [outcome(json.loads(line)) for line in (out / ROWS).read_text().splitlines()] for out in (killed, whole)
    )
    return {
        "rows": len(rows),
        "kills": KILLS,
        "rows_twice": len(rows) - len({row["row"] for row in rows}),
        "rows_that_differ": sum(one != other for one, other in zip(rows, same, strict=True)),
    }


def outcome(line: dict[str, Any]) -> dict[str, Any]:
    """Return all of a row that is not a time."""
    passes = {name: [each[:4] for each in way["passes"]] for name, way in line["drafters"].items()}
    return {"row": line["row"], "tokens": line["target_tokens"], "passes": passes}


if __name__ == "__main__":
    require_commit()
    main()
