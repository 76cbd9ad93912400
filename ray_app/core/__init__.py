"""Pure mathematics of the adapter: torch and numpy, no rank, device choice, file, clock or environment."""
