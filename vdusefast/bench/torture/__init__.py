"""`python -m vdusefast.bench torture`."""
