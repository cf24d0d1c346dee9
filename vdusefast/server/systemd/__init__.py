"""Servers under systemd."""
