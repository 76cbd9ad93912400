"""`ray-app capture`."""
