"""`ray-app demo decode`: live speculative decoding with the small target that sees, about rendered scenes."""

import json
import re
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from ray_app.commands.decode.command import render_decode, run_decode
from ray_app.commands.demo.answers import HELD_OUT, pictures
from ray_app.commands.demo.shipped import shipped_drafter, shipped_target
from ray_app.config.decode import DecodeConfig
from ray_app.config.demo import DemoDecodeConfig
from ray_app.errors import InputError
from ray_app.store.atomic import make_folder, write_file

CPUINFO = Path("/proc/cpuinfo")
DRAFTERS = ("hybrid", "previous_window")
PER_DRIVE = 4
MAX_NEW_TOKENS = 128


def run_demo_decode(cfg: DemoDecodeConfig) -> dict[str, Any]:
    """Decode live; return the --json object of `decode`.

    InputError: the target is not built, or damaged. Without --target: errors as `shipped_target`.
    """
    target = cfg.target or shipped_target(cfg.cache)
    if not target.exists():
        raise InputError(f"{target} is not there; build it first: ray-app demo build --out {target}")
    out = cfg.out.absolute()
    prompts = write_prompts(out / "pictures", cfg.num_pictures, cfg.seed)
    return run_decode(
        DecodeConfig(
            source=(prompts,),
            target=target,
            out=out / "results",
            drafter=cfg.drafter or (*DRAFTERS, *shipped_drafter(target)),
            max_new_tokens=MAX_NEW_TOKENS,
            draft_length="fixed",  # a few pictures are too short for γ to be learnt from them
            dtype=processor_dtype(CPUINFO.read_text(encoding="utf-8")) if cfg.dtype == "auto" else cfg.dtype,
            watch=True,
            html=out / "decode.html",
        )
    )


def processor_dtype(cpuinfo: str) -> Literal["float32", "bfloat16"]:
    """Return bfloat16 if the flags in /proc/cpuinfo have a multiplication of it, else float32.

    Without one, on an AMD EPYC, five tokens took 3.6 times as long as a step; in float32 nine took 1.8 times as long.
    """
    return "bfloat16" if re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", cpuinfo) else "float32"


def render_demo_decode(result: dict[str, Any], console: Console) -> None:
    """Print the table of `decode`."""
    render_decode(result, console)


def write_prompts(folder: Path, number: int, seed: int) -> Path:
    """Write pictures of held-out drives, their event images, and a file of prompts about them; return the file."""
    make_folder(folder)
    lines = []
    some = pictures(seed, HELD_OUT, -(-number // PER_DRIVE), PER_DRIVE, with_events=True)
    for each in islice(some, number):
        name, events = f"{each.sequence}_{each.t_us}.png", f"{each.sequence}_{each.t_us}_events.png"
        assert each.event_HWC is not None
        write_file(folder / name, png(each.image_HWC))
        write_file(folder / events, png(each.event_HWC))
        lines.append({"id": name, "sequence": each.sequence, "frames": [name], "events": [events]})
    path = folder / "prompts.jsonl"
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return path


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    """Return a picture as a PNG file."""
    file = BytesIO()
    Image.fromarray(image_HWC).save(file, "png")
    return file.getvalue()
