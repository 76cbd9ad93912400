"""`ray-app submit` and `ray-app jobs`."""
