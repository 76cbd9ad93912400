"""`ray-app encode`."""
