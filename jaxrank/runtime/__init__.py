"""Encoded pairs become scores: packed rows, compiled programs, calls of the device."""
