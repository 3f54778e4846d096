"""Devices beside the host's own processor."""
