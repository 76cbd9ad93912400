"""A drafter that sees events on the clock: live decoding with it, without it, and with drafters that see nothing.

    python -m benchmarks.speculative.event_clock models/demo --work runs/event_drafter

The drafter is that of seed 0 of `benchmarks.speculative.event_drafter`, whose --work this is, by KL. 8 rendered
drives that nothing was trained on, four pictures each; every cost is charged, the event image's encoder too. In fp32
γ is 8, and the passes of each answer are compared with those counted from one pass along it; in bf16 γ is chosen
online. `hybrid`, alone and with the drafter, and `ngram` have learnt the target's answers about the drafter's
training drives. With --head, an EAGLE head of `demo draft --kind eagle_head` and `hybrid` are measured instead. One
thread. With --rows 8 it is a quick look that is not saved; 104 are all that were answered about.
Writes benchmarks/results/event_clock.json, or with --head eagle_clock.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.provenance import require_commit, save
from benchmarks.speculative.decode import numbers_of, shard_rows
from benchmarks.speculative.event_drafter import SEED, Part, replay
from benchmarks.speculative.event_hybrid import WithDrafter
from ray_app.commands.decode.command import DecodePlan, plan_of
from ray_app.commands.decode.summary import SUMMED, sums_of
from ray_app.commands.decode.worker import decode_lane
from ray_app.commands.demo.decode import MAX_NEW_TOKENS, write_prompts
from ray_app.commands.demo.draft_training import STATES, TEST, TRAIN, Drafted, FrozenDrafter, drafted_by_eagle
from ray_app.config.decode import DecodeConfig
from ray_app.core.adapters.drafting import EagleHead
from ray_app.core.draft_losses import GAMMA
from ray_app.core.speculative.metrics import block_bootstrap
from ray_app.core.speculative.prompts import AnsweredPrompt, Prompt
from ray_app.drafters.hybrid import HybridDrafter
from ray_app.language_models.drafter_folder import EventDrafter, read_drafter, write_drafter
from ray_app.language_models.kinds import load
from ray_app.runs.run_dir import RunDir
from ray_app.store.atomic import write_file
from ray_app.store.capture_store import as_lines
from ray_app.store.checkpoint import load_checkpoint

NUM_ROWS = 32
SEES = ("events", "frames", "nothing")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--head", type=Path, help="folder of an EAGLE head, to measure that")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    target, work = asked.target.absolute(), asked.work.absolute()
    train = Part.of(work / TRAIN)
    prompts = write_prompts(work / "clock" / "prompts", asked.rows, SEED)
    traces = written_traces(work / "clock" / "traces.jsonl", train)
    drafter = asked.head.absolute() if asked.head else drafter_of(work, train)
    mixed = [f"hybrid+{drafter.name}-{sees}" for sees in SEES]
    drafters = (str(drafter), "hybrid") if asked.head else (str(drafter), f"hybrid+{drafter}", "hybrid", "ngram")
    runs = {}
    for dtype, draft_length in (("float32", "fixed"), ("bfloat16", "online")):
        cfg = DecodeConfig(
            source=(prompts,),
            target=target,
            out=work / "clock" / f"{'head_' if asked.head else ''}{dtype}_{asked.rows}",
            drafter=drafters,
            drafter_sees=() if asked.head else SEES,
            learn_from=(traces,),
            num_speculative_tokens=GAMMA,
            max_new_tokens=MAX_NEW_TOKENS,
            dtype=dtype,
            draft_length=draft_length,
        )
        plan = plan_of(cfg)
        decode_lane(plan.cfg, plan.data, plan.shards, plan.answered, "cpu")
        runs[dtype] = plan, [dict(row) for shard in plan.shards for row in shard_rows(cfg.out, shard.name)]
    result: dict[str, Any] = {
        dtype: numbers_of(*run) | {"over_hybrid": over_hybrid(run[1], [drafter.name] if asked.head else mixed)}
        for dtype, run in runs.items()
    }
    if asked.head:
        result["counted"] = counted_of_head(target, drafter, Part.of(work / (TEST + STATES)), runs["float32"][1])
    else:
        result["counted"] = counted(target, drafter, Part.of(work / TEST), *runs["float32"])
    if asked.rows >= NUM_ROWS:
        save("eagle_clock" if asked.head else "event_clock", result)
    else:
        print(json.dumps(result, indent=1))


def written_traces(path: Path, train: Part) -> Path:
    """Write the target's answers about the drafter's training drives, from which rules learn; return the file."""
    index = train.store.index
    learnt = [
        {
            "row": row,
            "sequence": str(index.sequence[row]),
            "question": each.prompt.question,
            "draft_tokens": [],
            "target_tokens": list(each.answer),
        }
        for row, each in enumerate(train.answered)
    ]
    write_file(path, as_lines(learnt))
    return path


def drafter_of(work: Path, train: Part) -> Path:
    """Return the folder of the drafter, written from the runs of seed 0 unless it is there."""
    folder = work / "clock" / "drafter"
    if not folder.exists():
        best = [RunDir(work / "seed_0" / name).best() for name in ("exit", "events_kl")]
        assert None not in best, "measure the drafter first"
        parts = [load_checkpoint(each).adapter for each in best if each]
        write_drafter(folder, parts, train.layout, {"work": "benchmarks.speculative"})
    return folder


def over_hybrid(lines: list[dict[str, Any]], names: list[str]) -> dict[str, dict[str, Any]]:
    """Return how many times as fast as `hybrid` other drafters are, paired, 95 % over drives."""

    def ratio(total_KM: NDArray[np.float64]) -> NDArray[np.float64]:
        return total_KM[:, :1] / total_KM[:, 1:]

    found = {}
    for name in names:
        times = [sums_of(lines, each)[:, SUMMED.index("total_ms")] for each in ("hybrid", name)]
        sums_S2 = np.stack(times, axis=1)
        low_1, high_1 = block_bootstrap(sums_S2, ratio, np.random.default_rng(0))
        found[name] = {
            "mean": float(ratio(sums_S2.sum(axis=0, keepdims=True))[0, 0]),
            "interval95": [float(low_1[0]), float(high_1[0])],
        }
    return found


@torch.no_grad()
def counted(
    target: Path, folder: Path, test: Part, plan: DecodePlan, lines: list[dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """Compare the passes of every answer with those that one pass of the drafter along it counts.

    Of a mix with `hybrid` also count the tokens that the drafter was asked for.
    """
    assert plan.cfg.draft_length == "fixed", "γ is the same in every pass"
    drafter = read_drafter(folder, load(target, "float32", "cpu"))
    assert isinstance(drafter, EventDrafter)
    frozen = FrozenDrafter(drafter.exit_layers, target / "language_model", test.layout)
    rows = rows_of(test, lines)
    answers = [
        AnsweredPrompt(Prompt(line["question"], (), sequence=line["id"]), tuple(line["target_tokens"]))
        for line in lines
    ]
    hybrid = HybridDrafter()
    hybrid.fit(plan.answered)
    shown = {"events": drafter.events(test.event_NE.float())[rows], "frames": test.image_NX[rows], "nothing": None}
    found = {}
    for sees, shown_NX in shown.items():
        name, rows_NT = f"{folder.name}-{sees}", test.rows_NT[rows]
        q = zip((line["id"] for line in lines), frozen.probabilities(rows_NT, shown_NX), strict=True)
        mixed = WithDrafter(hybrid, test.layout.vocabulary, dict(q))
        found[name] = against(lines, name, frozen.along(rows_NT, shown_NX))
        found[f"hybrid+{name}"] = against(lines, f"hybrid+{name}", replay(mixed, answers))
        found[f"hybrid+{name}"]["tokens_asked"] = mixed.asked[GAMMA]
    return found


def counted_of_head(target: Path, folder: Path, test: Part, lines: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Compare the passes of every answer with those counted from every position; rows hold half precision."""
    head = read_drafter(folder, load(target, "float32", "cpu"))
    assert isinstance(head, EagleHead)
    drafted = drafted_by_eagle(head, target / "language_model", test.layout, test.rows_NT[rows_of(test, lines)])
    return {folder.name: against(lines, folder.name, drafted)}


def rows_of(test: Part, lines: list[dict[str, Any]]) -> list[int]:
    """Return the row of the test part that each decoded line is about."""
    index = test.store.index
    named = zip(index.sequence, index.t_start_us, strict=True)
    places = {f"{sequence}_{t_us}.png": row for row, (sequence, t_us) in enumerate(named)}
    return [places[line["id"]] for line in lines]


def against(lines: list[dict[str, Any]], name: str, drafted: Drafted) -> dict[str, int]:
    """Return the passes of live decoding next to those that were counted."""
    live = [line["drafters"][name]["num_passes"] for line in lines]
    return {
        "passes_counted": int(drafted.passes_N.sum()),
        "passes_live": sum(live),
        "rows_that_differ": sum(int(one) != other for one, other in zip(drafted.passes_N, live, strict=True)),
    }


if __name__ == "__main__":
    require_commit()
    main()
