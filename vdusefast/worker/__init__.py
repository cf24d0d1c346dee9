"""One process, one virtqueue."""
