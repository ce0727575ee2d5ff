"""The only place that asks the operating system about the machine and its processes.

`reading` gives one `MachineSpec`, `process` what one process holds; `linux` and `macos` know where
each system says so.  A figure that the system does not give is None, never a guess.
"""
