"""Rendered driving scenes: pure numpy, a function of seed and time."""
