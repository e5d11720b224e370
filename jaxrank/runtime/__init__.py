"""Encoded pairs become scores: packed rows, compiled programs, device calls."""
