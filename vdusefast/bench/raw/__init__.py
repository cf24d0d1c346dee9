"""`python -m vdusefast.bench raw`: load through the loopback driver, as fast as rings go."""
