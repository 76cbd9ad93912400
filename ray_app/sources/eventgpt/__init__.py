"""The reference's dataset folder."""
