"""Language models from local folders."""
