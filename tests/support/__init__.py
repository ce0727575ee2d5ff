"""Helpers that several test packages import; `pythonpath` in pyproject.toml makes them visible."""
