"""`ray-app demo`."""
