"""Readers of real formats, one file each. Every source yields pairs and rejections, never an exception a row."""
