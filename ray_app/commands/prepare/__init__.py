"""`ray-app prepare`."""
