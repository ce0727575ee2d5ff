"""Checks of a machine and of brim on it: what was found, why it matters, what mends it."""
