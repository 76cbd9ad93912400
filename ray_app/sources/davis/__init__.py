"""DAVIS recordings (.aedat4)."""
