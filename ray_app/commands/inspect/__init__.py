"""`ray-app inspect`."""
