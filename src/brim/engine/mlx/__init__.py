"""The MLX engine: mlx-lm's model classes behind the engine contract.

Read engine.py.  Whatever of mlx-lm is imported here comes through `library`, which is set up first.
"""

from brim.engine.mlx import library

library.enter()
