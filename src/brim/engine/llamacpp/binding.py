"""Imports the low-level functions of llama_cpp without its high-level package.

`import llama_cpp` also imports its `Llama` class, servers' types and a disk cache: 50 ms and
modules (diskcache, pickle) that brim never uses.  Putting a bare package in its place while the
one submodule is imported skips that; a later `import llama_cpp` elsewhere still gets the real one.
"""

import ctypes
import importlib.metadata
import importlib.util
import sys
import types
from typing import Any

from brim.errors import EngineError


def _import_low_level() -> Any:
    if "llama_cpp" in sys.modules:
        import llama_cpp.llama_cpp

        return llama_cpp.llama_cpp
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("No module named 'llama_cpp'")
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    try:
        import llama_cpp.llama_cpp

        return llama_cpp.llama_cpp
    finally:
        del sys.modules["llama_cpp"]


lib: Any = _import_low_level()
"""llama.h as ctypes functions and structs."""

VERSION = importlib.metadata.version("llama-cpp-python")

MAX_SEQUENCES: int = lib.llama_max_parallel_sequences()

GGML_TYPES = {
    "f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2,
    "iq4_nl": 20,
}  # fmt: skip
"""KV types that llama-server offers, by their number in ggml.h."""

LOAD_MODE_MMAP = 1
VOCAB_TYPE_NONE = 0
FLASH_ATTENTION = {False: 0, True: 1}

# The parameter structs are passed by value: a field that moved would be read as another one.  The
# last fields are compared because additions shift them.
_EXPECTED_LAST_FIELDS = {
    "llama_model_params": "load_mtp",
    "llama_context_params": "ctx_other",
    "llama_batch": "logits",
}


def check_layout() -> None:
    """Refuse a binding whose structs are not the ones this adapter was written for.

    Raises:
        EngineError: The installed llama-cpp-python is another release in this respect.
    """
    for struct_name, last_field in _EXPECTED_LAST_FIELDS.items():
        fields = getattr(lib, struct_name)._fields_
        if fields[-1][0] != last_field:
            raise EngineError(
                f"llama.cpp: {struct_name} of llama-cpp-python {VERSION} is not the one that brim "
                "knows; install the version that brim pins"
            )


# ggml's abort callback is `bool (*)(void *)` and is asked at every graph node.  A Python function
# there would take the interpreter lock thousands of times a token; strlen on a one-byte string
# answers the same question in C: length 0 is "go on", length 1 is "abort".
_libc = ctypes.CDLL(None)
ABORT_CALLBACK_ADDRESS: int = ctypes.cast(_libc.strlen, ctypes.c_void_p).value or 0


def abort_callback() -> Any:
    """The callback in the form that llama.cpp's functions and structs take."""
    return ctypes.cast(ABORT_CALLBACK_ADDRESS, lib.ggml_abort_callback)
