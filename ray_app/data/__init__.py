"""Pairs as Ray Data and as tensors, and the order in which training sees them."""
