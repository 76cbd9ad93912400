"""The Ray edge: one file a command."""
