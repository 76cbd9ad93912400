"""The Ray cluster of a command: connection, jobs, environment."""
