"""Forms of requests and answers."""
