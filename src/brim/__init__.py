"""brim runs large language models locally and fills unified memory to the brim, never over it.

Start reading at ARCHITECTURE.md, then `brim.core`, `brim.scheduler.loop` and `brim.engine.base`.
Nothing is imported here: `brim --help` must not pay for engines or servers.
"""

__version__ = "0.1.0"
