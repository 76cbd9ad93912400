"""The model in service: where it comes from, how it is loaded, batched and replaced."""
