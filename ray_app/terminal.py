"""The one console of this project: what is printed is text, for a path such as `[night]` or `:star:` is no markup."""

from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that prints words as they are; colours are given as styles."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
