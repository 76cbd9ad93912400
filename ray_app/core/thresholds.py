"""Thresholds of cosine acceptance, and how they are named in results. No torch."""

THETAS = (0.50, 0.60, 0.70, 0.80, 0.85, 0.90, 0.95)
"""Thresholds of the reference."""
THETA = 0.80
"""Threshold of lift, promotion and sweeps."""


def rate_key(theta: float) -> str:
    """Key of a threshold, such as `0.80`: two digits, so that 0.57 and 0.58 differ."""
    return f"{theta:.2f}"
