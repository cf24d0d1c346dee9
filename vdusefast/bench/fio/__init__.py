"""`python -m vdusefast.bench fio`."""
