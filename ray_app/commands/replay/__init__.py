"""`ray-app replay`."""
