"""Gives memory and power back in steps when the system says that they are short.

`policy` is pure: readings in, actions out.  `loop` reads once a second, and when the system calls,
and has the actions applied by whoever implements its `Actuator`.
"""
