"""Pages for people: one HTML file each, of one look, light and dark, that refers to nothing outside itself.

Figures are inline SVG (figures.py), pictures are PNG inside the page.
"""

import base64
import io
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ray_app.errors import ConfigError, StoreError
from ray_app.store.atomic import write_file


def page(template: str, **context: Any) -> str:
    """A template of this folder, filled in. What the context says is text, never markup."""
    folder = resources.files("ray_app.reports") / "templates"
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return templates.get_template(template).render(**context)


def picture(name: str, alt: str, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """A template's view of a picture of shape (H, W, 3) or (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"name": name, "alt": alt, "png": png, "width": pixels.shape[1], "height": pixels.shape[0]}


def require_suffix(flag: str, path: Path | None, suffix: str) -> None:
    """ConfigError where a file that a flag asks for has another kind of name: said before the work, not after."""
    if path and path.suffix.lower() != suffix:
        raise ConfigError(f"{flag} {path}: end its name in {suffix}.")


def write_for_people(flag: str, path: Path, data: bytes) -> None:
    """Writes what a flag asks for; a file of that name is replaced. StoreError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise StoreError(f"{flag} {path} cannot be written: {error.strerror}.") from error
