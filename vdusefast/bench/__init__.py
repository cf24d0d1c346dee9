"""Benchmarks: `python -m vdusefast.bench`."""
