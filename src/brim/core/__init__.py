"""Frozen values that every layer shares: no I/O, no clocks, no threads.

One module per noun: `sampling`, `request`, `answer`, `step`, `model`, `machine`, `plan`, `memory`,
and the `tokenizer` protocol.  All are msgspec structs, so they cross the worker's socket as is.
"""
