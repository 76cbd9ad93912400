"""Ray application that aligns EventGPT features with Video-LLaVA features, and says honestly how well.

    import ray_app
    model = ray_app.load("runs/drive")

The names of `__all__` are in `ray_app.api`, which is imported when one of them is first used: `import ray_app` takes
milliseconds, and neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_app.api import (
        AlignmentModel,
        LightweightAlignmentModule,
        Part,
        Report,
        Store,
        load,
        open_store,
        train,
        write_store,
    )

__all__ = [
    "AlignmentModel",
    "LightweightAlignmentModule",
    "Part",
    "Report",
    "Store",
    "load",
    "open_store",
    "train",
    "write_store",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("ray_app.api"), name)
    raise AttributeError(f"module 'ray_app' has no attribute '{name}'")
