"""`python -m vdusefast.bench peers`."""
