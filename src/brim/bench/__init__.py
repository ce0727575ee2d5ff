"""Measuring: what an engine does alone, and what servers do with the same recorded requests.

`stats` turns samples into medians and spreads, `speed` times an engine without a server around it,
`client`, `answers` and `serve` talk to an HTTP server and time it, `serving` compares servers side
by side, `processes` starts them and reads what the OS says of them.  Nothing here judges: it
reports samples, and the reader decides.
"""
