"""The driver's side of a loopback device."""
