"""The library transformers, which only encoders and language models need."""

from types import ModuleType

from ray_app.errors import ResourceError


def transformers() -> ModuleType:
    """Return the library, silent. ResourceError: it is not installed."""
    try:
        import transformers as library
    except ImportError as error:
        raise ResourceError(
            "encoders and language models need the library transformers, which is not installed: "
            "pip install 'ray-app[models]'"
        ) from error
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    return library
