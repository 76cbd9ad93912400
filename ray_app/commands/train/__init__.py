"""`ray-app train`."""
