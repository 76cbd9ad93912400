"""Bytes on disk: pair store, split, checkpoint, provenance. No Ray."""
