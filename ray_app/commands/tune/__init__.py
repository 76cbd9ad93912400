"""`ray-app tune`."""
