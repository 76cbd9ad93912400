"""Models whose pictures come through our encoders: EventGPT in its own format, and folders that join three models."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from ray_app.errors import InputError
from ray_app.language_models.answers import answer
from ray_app.language_models.joined import JoinedConfig, projector_of, save_joined
from ray_app.language_models.kinds import load
from ray_app.language_models.loading import vocabulary

QUESTION = "What is there ?"
FRAMES = np.random.default_rng(0).integers(0, 255, (2, 40, 60, 3), dtype=np.uint8)
VOCABULARY = len(tiny_models.SPECIAL) + len(tiny_models.WORDS)
WIDTH = tiny_models.WIDTH


def processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": tiny_models.SIDE}, crop_size={"height": tiny_models.SIDE, "width": tiny_models.SIDE}
    )


def save_eventgpt(folder: Path) -> tuple[CLIPVisionModel, nn.Module, nn.Module, LlamaForCausalLM]:
    """EventGPT as it is published, a few thousand weights: one file, the keys of its own code."""
    torch.manual_seed(0)
    tower = CLIPVisionModel(tiny_models.vision()).eval()
    projector, adaptor = projector_of((16, WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH)
    model = LlamaForCausalLM(LlamaConfig(**tiny_models.llama())).eval()
    tiny_models.silence(model)
    tensors = {
        **{f"model.visual_tower.visual_tower.{key}": value for key, value in tower.state_dict().items()},
        **{f"model.visual_projector.{key}": value for key, value in projector.state_dict().items()},
        **{f"model.feature_adaptor.{key}": value for key, value in adaptor.state_dict().items()},
        **model.state_dict(),
    }
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = {
        **json.loads(model.config.to_json_string()),
        "model_type": "EventChat_llama",
        "architectures": ["EventChatModel"],
        "auto_map": {"AutoModelForCausalLM": "own_code.EventChatModel"},
        "event_feature_adaptor": True,
        "vision_config": json.loads(tower.config.to_json_string()),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tiny_models.tokenizer().save_pretrained(folder)
    processor().save_pretrained(folder)
    return tower, projector, adaptor, model


def test_eventgpt_says_what_its_parts_say_by_hand(tmp_path: Path) -> None:
    tower, projector, adaptor, llama = save_eventgpt(tmp_path / "eventgpt")
    (tmp_path / "eventgpt" / "prompt_template.txt").write_text("USER : <event>\n{question} ASSISTANT :")
    assert vocabulary(tmp_path / "eventgpt").size == VOCABULARY
    model = load(tmp_path / "eventgpt", "float32", "cpu")
    said = answer(model, FRAMES, QUESTION, max_new_tokens=8)
    text = tiny_models.tokenizer()
    with torch.inference_mode():
        pixels = processor()(list(FRAMES), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        states_TSD = adaptor(projector(tower(pixels).last_hidden_state))
        events_ND = torch.cat([states_TSD.mean(dim=1), states_TSD.mean(dim=0)])
        embed = llama.get_input_embeddings()
        before, after = (torch.tensor(text(part)["input_ids"]) for part in ("USER :", f"{QUESTION} ASSISTANT :"))
        prefix_PD = torch.cat([embed(before), events_ND, embed(after)])
        tokens: list[int] = []
        while len(tokens) < 8 and tokens[-1:] != [2]:
            whole = torch.cat([prefix_PD, embed(torch.tensor(tokens, dtype=torch.long))])
            tokens.append(int(llama(inputs_embeds=whole[None], use_cache=False).logits[0, -1].argmax()))
    assert len(events_ND) == 2 + 5
    assert said.tokens == tokens
    assert answer(model, 255 - FRAMES, QUESTION, max_new_tokens=8).tokens != tokens


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    CLIPVisionModel(tiny_models.vision()).save_pretrained(tmp_path / "tower")
    processor().save_pretrained(tmp_path / "tower")
    tiny_models.save_drafter(tmp_path / "text", seed=0)
    widths = (16, 24, WIDTH)
    config = JoinedConfig(pool="2x2", projector=widths, prompt="USER : {pictures}\n{question} ASSISTANT :")
    save_joined(tmp_path / "joined", config, projector_of(widths), tmp_path / "tower", tmp_path / "text")
    return tmp_path / "joined"


def test_a_joined_folder_reads_pictures_as_its_parts_do(joined: Path) -> None:
    model = load(joined, "float32", "cpu")
    prefix_PD = model.prefix(model.prompt(FRAMES, QUESTION))
    tower = CLIPVisionModel.from_pretrained(joined / "encoder").eval()
    projector = projector_of((16, 24, WIDTH))
    projector.load_state_dict(load_file(joined / "model.safetensors"))
    with torch.inference_mode():
        pixels = processor()(list(FRAMES), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        grid_TSE = tower(pixels).last_hidden_state[:, 1:]  # 2 x 2 patches, which the pool keeps
        expected_ND = projector(grid_TSE).flatten(0, 1)
    torch.testing.assert_close(prefix_PD[2:10], expected_ND, atol=1e-5, rtol=1e-4)
    assert vocabulary(joined).size == VOCABULARY
    said = [answer(model, pixels, QUESTION, max_new_tokens=8).tokens for pixels in (FRAMES, 255 - FRAMES, None)]
    assert len({tuple(tokens) for tokens in said}) == 3


def test_a_joined_folder_is_checked_before_anything_is_read(joined: Path, tmp_path: Path) -> None:
    path = joined / "language_model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"language_model/model.safetensors is missing or damaged: its SHA-256"):
        load(joined, "float32", "cpu")
    data[-1] ^= 1
    path.write_bytes(data)
    (joined / "more.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"more.bin is not in MANIFEST.sha256"):
        load(joined, "float32", "cpu")
    (joined / "more.bin").unlink()
    load(joined, "float32", "cpu")
    config = JoinedConfig(projector=(16, 8))
    save_joined(tmp_path / "narrow", config, projector_of((16, 8)), tmp_path / "tower", tmp_path / "text")
    with pytest.raises(InputError, match=f"the projector ends at width 8, the language model reads {WIDTH}"):
        load(tmp_path / "narrow", "float32", "cpu")
    with pytest.raises(InputError, match="already exists; nothing is overwritten"):
        save_joined(tmp_path / "narrow", config, projector_of((16, 8)), tmp_path / "tower", tmp_path / "text")
