"""The Serve edge: the champion behind the Open Inference Protocol v2 and a plain `/v1`, on Ray Serve."""
