"""The only place that asks about a machine and its processes.

`interface` says what every machine answers; `linux_machine`, `macos` and `simulated` implement it,
`reading` and `process` ask the one at hand, and `chips` describes those that are not.  A figure
that a system does not give is None, never a guess, and its source says why.  `pressure_watch` calls
back when memory is short, `energy` counts joules, `power_assertion` and `qos` tell the system what
it should know of us.
"""
