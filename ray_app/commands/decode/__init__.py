"""`ray-app decode`."""
