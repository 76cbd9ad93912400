"""`ray-app correlate`."""
