"""Drafters of the next tokens of a target, and exact replay of recorded outputs."""
