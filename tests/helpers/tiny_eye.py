"""A tiny image encoder and a tiny language model that knows the words of scenes' answers."""

import re
from dataclasses import replace
from pathlib import Path

import tiny_models
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from ray_app.scenes.captions import FRAME_QUESTIONS, answer
from ray_app.scenes.facts import SceneFacts, Vehicle

FACTS = SceneFacts(
    place="city",
    daytime="day",
    cloudy=False,
    bend="left",
    lanes=1,
    sides=("houses", "trees"),
    lead=Vehicle("car", "red", 10.0),
    ahead=(),
    oncoming=(),
    crossing=0,
    parked=(0, 0),
    people=(0, 0),
    people_crossing=0,
    traffic_light="",
)
SIDE = 56


def words() -> list[str]:
    """Words of answers to every question about a few different scenes, and of the questions."""
    others = (
        FACTS,
        replace(FACTS, place="highway", daytime="night", cloudy=None, lead=None, lanes=3, bend="straight"),
        replace(FACTS, place="country", daytime="dusk", cloudy=True, bend="right", lanes=2, people=(1, 0)),
        replace(FACTS, place="suburb", parked=(2, 3), oncoming=(Vehicle("van", "", 30.0),), people_crossing=1),
    )
    said = [answer(facts, asked, seed) for facts in others for asked in FRAME_QUESTIONS for seed in range(8)]
    return sorted({word for text in (*said, *FRAME_QUESTIONS) for word in re.findall(r"\w+|[^\w\s]+", text)})


def save_language_model(folder: Path) -> Path:
    return tiny_models.save_drafter(folder, words=words())


def save_encoder(folder: Path) -> Path:
    """A CLIP tower with a grid of 4 x 4."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        projection_dim=16,
    )
    CLIPVisionModel(config).eval().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder
