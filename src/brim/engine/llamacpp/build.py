"""`python -m brim.engine.llamacpp.build`: what the installed llama.cpp was built for, as JSON.

In a process of its own, so that whoever asks loads no backend.
"""

import json
import sys


def main() -> int:
    """Print version, GPU support and instruction sets."""
    from brim.engine.llamacpp.binding import VERSION, lib

    text = lib.llama_print_system_info().decode("utf-8", "replace")
    has_gpu = bool(lib.llama_supports_gpu_offload())
    found = {"version": VERSION, "has_gpu": has_gpu, "features": features(text)}
    sys.stdout.write(json.dumps(found))
    return 0


def features(text: str) -> list[str]:
    """Instruction sets that are compiled in, of what llama.cpp says of itself.

    Example:
        >>> features("CPU : SSE3 = 1 | AVX = 1 | AVX2 = 0 | REPACK = 1 | ")
        ['SSE3', 'AVX', 'REPACK']
    """
    pairs = [part.rpartition(":")[2].split("=") for part in text.split("|") if "=" in part]
    return [name.strip() for name, value in pairs if value.strip() == "1"]


if __name__ == "__main__":
    sys.exit(main())
