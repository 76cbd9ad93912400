"""Settings in a model's folder, read without torch."""

from pathlib import Path
from typing import Any

from ray_app.errors import InputError
from ray_app.parsing.json_text import parse_object


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a model's folder. InputError: missing or damaged."""
    path = folder / name
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{folder} has no {name}; name the folder of a Hugging Face model, as `save_pretrained` writes it."
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a JSON object: {error}") from error
