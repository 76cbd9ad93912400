"""Verification of drafts and the metrics of speculative decoding: pure."""
