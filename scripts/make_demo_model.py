"""Makes the demo model that comes with brim from the checkpoint of pystd-6m.

usage: make_demo_model.py MODEL_DIR

docs/demo-model.md says what the model is.  The result is the same bytes for the same checkpoint.
"""

import sys
from pathlib import Path

from brim.registry.convert import convert_to_gguf
from brim.registry.sources import DEMO_PATH


def main() -> None:
    """Convert the checkpoint that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    spec = convert_to_gguf(
        Path(sys.argv[1]), DEMO_PATH, "Q8_0", name="brim demo", license="PSF-2.0"
    )
    size_bytes = DEMO_PATH.stat().st_size
    sys.stdout.write(f"{DEMO_PATH}: {spec.num_parameters} parameters, {size_bytes} bytes\n")


if __name__ == "__main__":
    main()
