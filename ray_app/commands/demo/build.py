"""`ray-app demo build`: a target that sees, from an image encoder and a language model, trained on rendered scenes.

Each stage leaves a folder that appears whole or not at all, and is skipped where its folder is there:

    OUT.build/settings.json   what is built
    OUT.build/data/           rows (a pair store), the projector's start, the probe's values
    OUT.build/run/            the training run
    OUT.build/parts/          what was trained, in half precision
    OUT                       encoder, projector and language model, joined
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ray_app.cluster.resources import free_memory_bytes
from ray_app.commands.demo.answers import TRAINING, Picture, features_of, pictures, write_rows
from ray_app.commands.demo.command import fetched
from ray_app.commands.demo.evaluate import held_out, majority_of, render_demo_evaluate
from ray_app.commands.demo.projector_start import Probe, projector_start, solve_probe
from ray_app.commands.demo.sight import judge
from ray_app.commands.demo.target import ASKED, PROVENANCE, SEEN, demo_encoder, identity_of, join_parts, write_parts
from ray_app.commands.train.command import run_train
from ray_app.config.demo import DemoBuildConfig
from ray_app.config.train import AnswerTrainConfig
from ray_app.core.adapters.image_tokens import ImageTokens
from ray_app.encoders.base import VisionModel
from ray_app.encoders.library import transformers
from ray_app.errors import ResourceError, RunStopped, StoreError
from ray_app.language_models.answer_objective import shape_of
from ray_app.language_models.joined import verify_joined
from ray_app.language_models.kinds import load
from ray_app.language_models.loading import read_tokenizer, read_weights
from ray_app.parsing.json_text import parse_object
from ray_app.runs.run_dir import RUN
from ray_app.scenes.captions import FACTS
from ray_app.scenes.facts import SceneFacts
from ray_app.scenes.scene import RENDERER
from ray_app.store.atomic import staged_folder
from ray_app.store.checkpoint import load_checkpoint, read_tensors, save_training_state
from ray_app.store.provenance import provenance
from ray_app.terminal import make_console

MEMORY_FACTOR = 3.0
"""Memory of a build as a multiple of the language model's weights in float32."""
AT_ONCE = 50
"""Pictures that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Amounts of a build."""

    probe_drives: int
    """Drives that the projector's start is solved on, none of which it is trained on: of pictures that a probe knows
    its scores are surer than of new ones."""
    drives: int
    """Drives that are trained on."""
    per_drive: int
    """Pictures of each."""
    rows_each: int
    """Questions of each picture that is trained on."""
    num_epochs: int
    """Rounds over all rows."""
    learning_rate: float = 1.5e-3
    """AdamW learning rate, which falls to zero by half a cosine."""
    batch_size: int = 4
    """Rows of a step."""
    rank: int = 8
    """Rank of the LoRA factors."""


RECIPES = {"full": Recipe(330, 170, 5, 1, 3), "small": Recipe(3, 6, 2, 1, 1)}
"""Recipes by --size.

A full build on one core, in seconds: 2,500 pictures of 0.2 each are 500. A row has 68 tokens on average, 44 of them
its answer, and takes 35 GFLOP forwards and backwards: 14.4 in the linear maps and 2.5 in the head, twice, since
frozen weights need no gradient, and 1.6 in attention and LoRA. That is 0.58 at 70 GFLOP a second with 15 % for the
rest, and 3 x 850 rows are 1,480. The judge's 624 answers are 350, all else 100: 41 minutes.
"""


def run_demo_build(cfg: DemoBuildConfig) -> dict[str, Any]:
    """Build what is not there yet, then judge it; return the --json object.

    InputError: a model that does not fit. ResourceError: no package index, or too little memory. StoreError: a folder
    holds something else.
    """
    recipe, out, log = RECIPES[cfg.size], cfg.out.absolute(), make_console(stderr=True)
    encoder_folder, language_model = _models(cfg)
    shape_of(language_model)
    models = identity_of(encoder_folder, language_model)
    settings = {"size": cfg.size, "seed": cfg.seed, "renderer": RENDERER, **asdict(recipe), **models}
    kept = _is_of(out, settings)
    _require_memory(language_model)
    encoder = demo_encoder(encoder_folder)
    if not kept:
        work = out.with_name(f"{out.name}.build")
        claim_work(work, settings)
        parts = work / "parts"
        log.rule("1/4 data: rendered scenes, encoded, with questions and true answers")
        _data(work / "data", cfg, recipe, encoder, language_model)
        log.rule("2/4 train the projector and LoRA")
        if not parts.exists():
            adapter = load_checkpoint(_trained(cfg, recipe, work, language_model)).adapter
            assert isinstance(adapter, ImageTokens)
            seen = parse_object((work / "data" / SEEN).read_bytes())
            origin = {**provenance(["demo", "build"]), "settings": settings}
            write_parts(parts, adapter, models, {SEEN: seen, PROVENANCE: origin})
        log.rule("3/4 merge")
        join_parts(parts, out, encoder_folder, language_model)
    log.rule("4/4 judge")
    probe, majority = probe_of(out)
    some = held_out(cfg.seed, cfg.num_test_drives)
    sight = judge(load(out, "float32", "cpu"), some, majority, probe.answers(features_of(encoder, some)), cfg.seed)
    return {"target": str(cfg.out), "kept": kept, "bytes": _size(out), "sight": sight}


def render_demo_build(result: dict[str, Any], console: Console) -> None:
    """Print how well the target sees."""
    render_demo_evaluate(result, console)


def _models(cfg: DemoBuildConfig) -> tuple[Path, Path]:
    """Return the folders of encoder and language model, fetched where none is named."""
    encoder = cfg.encoder or fetched("mobilenet_v2", cfg.cache)
    return encoder.absolute(), (cfg.language_model or fetched("smollm2", cfg.cache)).absolute()


def _is_of(out: Path, settings: dict[str, Any]) -> bool:
    """Return True if the folder is the result of these settings, whole. StoreError: it is something else."""
    if not out.exists():
        return False
    try:
        found = parse_object((out / PROVENANCE).read_bytes()).get("settings")
    except (OSError, ValueError):
        found = None
    if found != parse_object(json.dumps(settings)):
        raise StoreError(f"{out} holds another model; name another --out, or move it away.")
    verify_joined(out)
    return True


def claim_work(work: Path, settings: dict[str, Any]) -> None:
    """Record what is built. StoreError: the folder is of a build of other settings."""
    text = json.dumps(settings, indent=1) + "\n"
    if not work.exists():
        with staged_folder(work) as staged:
            (staged / "settings.json").write_text(text, encoding="utf-8")
        return
    path = work / "settings.json"
    if not path.is_file():
        raise StoreError(f"{work} holds something else; move it away.")
    if path.read_bytes() != text.encode():
        raise StoreError(f"{work} is of a build of other settings; repeat that one, or move it away.")


def _require_memory(language_model: Path) -> None:
    size = sum(path.stat().st_size for path in language_model.glob("*.safetensors"))
    needed, free = MEMORY_FACTOR * size + 2**30, free_memory_bytes()
    if free < needed:
        raise ResourceError(
            f"building needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free; close something."
        )


def _data(folder: Path, cfg: DemoBuildConfig, recipe: Recipe, encoder: VisionModel, language_model: Path) -> None:
    """Render, encode, answer, and solve the projector's start."""
    if folder.exists():
        return
    log, total = make_console(stderr=True), (recipe.probe_drives + recipe.drives) * recipe.per_drive
    source = pictures(cfg.seed, TRAINING, recipe.probe_drives + recipe.drives, recipe.per_drive)
    some: list[Picture] = []
    parts: list[Tensor] = []
    while batch := list(islice(source, AT_ONCE)):
        parts.append(features_of(encoder, batch))
        some += [replace(each, image_HWC=each.image_HWC[:0].copy()) for each in batch]
        log.print(f"{len(some)} of {total} pictures")
    features_NE = torch.cat(parts)
    tokenizer = read_tokenizer(language_model)
    facts = [each.facts for each in some]
    of_probe = slice(recipe.probe_drives * recipe.per_drive)
    trained_on = slice(of_probe.stop, None)
    probe = solve_probe(features_NE[of_probe], facts[of_probe])
    words = _words(language_model, tokenizer, facts)
    start = projector_start(probe, features_NE[trained_on], facts[trained_on], words)
    with staged_folder(folder) as staged:
        rows = some[trained_on], features_NE[trained_on]
        write_rows(staged / "rows", *rows, tokenizer, ASKED, recipe.rows_each, cfg.seed)
        save_training_state(staged / "start", start, {})
        document = {"values": probe.values, "majority": majority_of(facts)}
        (staged / SEEN).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _words(language_model: Path, tokenizer: Any, facts: Sequence[SceneFacts]) -> dict[str, Tensor]:
    """Return the mean of the language model's embeddings of the tokens of every value."""
    model = read_weights(language_model, transformers().AutoModelForCausalLM, "float32", "cpu")
    embed = model.get_input_embeddings().weight.detach()
    values = {fact.true(each) for each in facts for fact in FACTS.values()}
    return {
        value: embed[tokenizer(f" {value}", add_special_tokens=False)["input_ids"]].mean(dim=0) for value in values
    }


def probe_of(target: Path) -> tuple[Probe, dict[str, str]]:
    """Return the linear probe that the projector begins with, and the majority of each kind of fact."""
    seen = parse_object((target / SEEN).read_bytes())
    tensors = read_tensors(target / "model.safetensors")
    values = {kind: tuple(each) for kind, each in seen["values"].items()}
    return Probe(values, tensors["0.weight"], tensors["0.bias"]), seen["majority"]


def _trained(cfg: DemoBuildConfig, recipe: Recipe, work: Path, language_model: Path) -> Path:
    """Train, or resume the run, or keep a finished one; return its last checkpoint."""
    run = work / "run"
    start = (work / "data" / "start" / "training_state.safetensors").absolute()
    hidden = len(read_tensors(start)["projector.0.bias"])
    settings = AnswerTrainConfig(
        store=str(work / "data" / "rows"),
        out=str(run),
        resume=str(run) if (run / RUN).is_file() else None,
        language_model=language_model,
        projector_start=start,
        image_tokens=len(FACTS),
        hidden_dim=hidden,
        rank=recipe.rank,
        test_share=0.01,
        val_share=0.05,
        num_epochs=recipe.num_epochs,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        weight_decay=0.0,
        schedule="cosine",
        early_stop_patience=recipe.num_epochs,
        checkpoint_every=50,
        cpus_per_worker=1.0,
        seed=cfg.seed,
        address=cfg.address,
        tracking_uri=cfg.tracking_uri,
        experiment="demo",
    )
    try:
        return Path(run_train(settings)["checkpoint"])
    except RunStopped as error:
        raise type(error)("interrupted; what was saved is whole: repeat this command to continue.") from None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
