"""MLflow: the logger that mirrors event logs, and the model registry."""
