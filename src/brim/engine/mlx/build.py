"""`python -m brim.engine.mlx.build`: what the installed MLX was built for, as JSON.

In a process of its own, so that whoever asks loads no backend.
"""

import importlib.metadata
import json
import sys


def main() -> int:
    """Print version and GPU support."""
    import mlx.core as mx

    has_gpu = bool(mx.metal.is_available())
    version = importlib.metadata.version("mlx")
    sys.stdout.write(json.dumps({"version": version, "has_gpu": has_gpu}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
