"""A served device as a process."""
