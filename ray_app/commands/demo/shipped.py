"""The demo's target from the trained parts in this package: joined with two fetched models, once, in the cache.

And its drafter, for which joining on another kind of processor may have made another target: it says so then.
"""

from pathlib import Path

from ray_app.commands.demo.command import cache_folder, fetched
from ray_app.commands.demo.target import GOLDEN, join_parts
from ray_app.errors import CheckpointError, InputError
from ray_app.language_models.drafter_folder import require_target
from ray_app.store.atomic import in_turn, verify_folder
from ray_app.store.checkpoint import read_document
from ray_app.terminal import make_console

PARTS = Path(__file__).with_name("parts")
"""Trained parts, as `demo build` left them."""
ANSWERS = Path(__file__).with_name(GOLDEN)
"""Golden answers of the target that these parts were measured in."""
EVENT_DRAFTER = Path(__file__).with_name("event_drafter")
"""A drafter of this target that is shown event images, as `demo draft` left it."""


def shipped_target(cache: Path | None) -> Path:
    """Return the folder of the target, joined from the parts in this package if it is not in the cache.

    InputError: the package has no parts. CheckpointError: damaged parts, or a target that answers otherwise than the
    measured one. Further errors as `fetched`.
    """
    if not PARTS.is_dir():
        raise InputError(
            "this package has no trained parts of a target; build one, and name it with --target: "
            "ray-app demo build --out models/demo"
        )
    folder = cache_folder(cache) / f"demo-target-{verify_folder(PARTS)[:12]}"
    if not folder.exists():
        log = make_console(stderr=True)
        log.print(f"making {folder}, once: fetching MobileNetV2 and SmolLM2 (101 MB) if they are not there")
        encoder, language_model = fetched("mobilenet_v2", cache), fetched("smollm2", cache)
        with in_turn(folder):
            if not folder.exists():  # by now another process may have made it
                log.print("joining them with the trained parts of this package")
                join_parts(PARTS, folder, encoder, language_model)
    if read_document(folder / GOLDEN)["tokens"] != read_document(ANSWERS)["tokens"]:
        raise CheckpointError(
            f"{folder} gives other golden answers than the target that was measured. Delete it and repeat the "
            "command; if that does not help, build a target here: ray-app demo build --out models/demo"
        )
    return folder


def shipped_drafter(target: Path) -> tuple[str, ...]:
    """Return the name of the drafter in this package for `decode`, or none where it is another target's.

    CheckpointError: the drafter is damaged.
    """
    try:
        require_target(EVENT_DRAFTER, target)
    except InputError as error:
        make_console(stderr=True).print(f"without the drafter in this package: {error}")
        return ()
    return (str(EVENT_DRAFTER),)
