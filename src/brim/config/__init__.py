"""One frozen tree of settings: defaults < file < environment < flags, each value with its origin.

`tree` holds the settings themselves, `load` reads them, `document` writes docs/settings.md from
them.  Nothing below `cli` reads the environment or a file for a setting: values are passed down.
"""
