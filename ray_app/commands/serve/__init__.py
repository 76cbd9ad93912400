"""`ray-app serve`."""
