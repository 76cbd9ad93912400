"""`ray-app evaluate`, `benchmark` and `compare`."""
