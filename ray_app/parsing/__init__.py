"""Readers of what others wrote, bounded in time, memory and depth: JSON, YAML, pickles, zip archives."""
