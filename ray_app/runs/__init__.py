"""A training run on disk or in a bucket: its folder and its event log."""
