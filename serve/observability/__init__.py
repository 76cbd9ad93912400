"""Metrics, statistics and traces of a replica."""
