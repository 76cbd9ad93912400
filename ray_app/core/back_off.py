"""Pauses between tries that fail, the same everywhere: each twice as long as the one before, up to a limit."""


def back_off_s(failures: int, longest_s: float, first_s: float = 1.0) -> float:
    """Seconds to wait after so many failures in a row, from 1 on."""
    return min(first_s * 2.0 ** min(failures - 1, 64), longest_s)
