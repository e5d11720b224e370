"""Connections, limits and access: what every request passes, whatever it asks."""
