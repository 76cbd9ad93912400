"""`ray-app promote`."""
