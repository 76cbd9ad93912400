"""DSEC recordings."""
