"""Stand-ins: random-weight models of any shape, to try before you download.

Speed and memory depend on a model's shape and quant, not on what it has learned.

    from brim.bench.standin import blueprint, tiny, write

    write("qwen.gguf", blueprint(tiny("qwen3moe"), "Q4_K_M"))          # a few megabytes, for tests
    write("llama.gguf", blueprint(Dimensions(architecture="llama", ...), "Q8_0"))
    write("big.gguf", blueprint(...), with_data=False)                 # sparse, for dry runs
    write("copy.gguf", clone_blueprint("any.gguf"))                    # any architecture
    write("short.gguf", sliced(clone_blueprint("any.gguf"), 8))        # eight of its layers
"""

from brim.bench.standin.blueprint import Blueprint
from brim.bench.standin.clone import clone_blueprint
from brim.bench.standin.dimensions import Dimensions, tiny
from brim.bench.standin.slices import sliced
from brim.bench.standin.templates import ARCHITECTURES, blueprint
from brim.bench.standin.writer import write

__all__ = [
    "ARCHITECTURES",
    "Blueprint",
    "Dimensions",
    "blueprint",
    "clone_blueprint",
    "sliced",
    "tiny",
    "write",
]
