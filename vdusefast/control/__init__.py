"""The control plane of one device."""
