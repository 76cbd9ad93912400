"""Adapters from event features to target features: pure torch."""
