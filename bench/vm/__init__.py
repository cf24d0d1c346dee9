"""A guest to test in: boots a Debian kernel under software emulation and runs a command there, on this checkout."""
