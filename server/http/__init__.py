"""Connections, limits and access: the checks for every request, on any route."""
