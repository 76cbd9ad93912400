"""Draws the console's samples into index.html: rendered scenes with simulated events.

    python -m benchmarks.serve.console_samples

The event image is kept as the sensor's own picture, in its three colours: 640 × 480 such pixels are a third of the
bytes of the 224 × 224 that the endpoint makes of them, and the endpoint makes the same of them as `prepare` does. The
target is a JPEG. The seed is none that a store has by default, so no adapter has seen them.
"""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ray_app.events.render import event_image
from ray_app.sources.scenes import ScenesSource

PAGE = Path(__file__).resolve().parents[2] / "serve" / "console" / "index.html"
SOURCE = ScenesSource(num_pairs=1000, num_sequences=60, seed=7)
CHOSEN = {"Road by day": 12, "Crossing": 9, "Town at dusk": 8}
"""Drives, by the words on their buttons."""
WINDOW = 4
SIZE = (224, 224)


def main() -> None:
    block = json.dumps([sample(name, drive) for name, drive in CHOSEN.items()], separators=(",", ":"))
    pattern = r'(<script type="application/json" id="sample-data">).*?(</script>)'
    page, count = re.subn(pattern, lambda match: match[1] + block + match[2], PAGE.read_text(), flags=re.DOTALL)
    assert count == 1
    PAGE.write_text(page)


def sample(name: str, drive: int) -> dict[str, str]:
    """One pair: its name, and both pictures as base64."""
    scene = SOURCE.scene(drive)
    middle_s = (WINDOW * SOURCE.step_us + SOURCE.duration_us // 2) * 1e-6
    event = Image.fromarray(event_image(SOURCE.events(scene, drive, WINDOW)))
    target = Image.fromarray(scene.rgb(middle_s)).resize(SIZE, Image.Resampling.BILINEAR)
    return {
        "name": name,
        "event": encoded(three_colours(np.asarray(event)), "PNG", optimize=True),
        "target": encoded(target, "JPEG", quality=92),
    }


def three_colours(image_HWC: NDArray[np.uint8]) -> Image.Image:
    """Return the same picture with a palette: two bits a pixel."""
    colours, places = np.unique(image_HWC.reshape(-1, 3), axis=0, return_inverse=True)
    drawn = Image.fromarray(places.reshape(image_HWC.shape[:2]).astype(np.uint8), "P")
    drawn.putpalette(colours.tobytes())
    return drawn


def encoded(image: Image.Image, kind: str, **settings: int) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    main()
