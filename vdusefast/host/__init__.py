"""This machine: its CPUs, processes, mounts and devices."""
