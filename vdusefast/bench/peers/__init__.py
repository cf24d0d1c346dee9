"""`python -m vdusefast.bench peers`."""

# The names of the classes in kinds.py, in their order, for the help.
PEERS = ("vdusefast", "qsd", "loop", "qemu-nbd", "nbdkit", "vdusefast-nbd", "ublk", "null_blk")
