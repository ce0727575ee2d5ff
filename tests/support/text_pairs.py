"""One vocabulary on two engines: llama.cpp's tokenizer of a GGUF file, without its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import require_engine

from brim.core.tokenizer import Tokenizer


@contextmanager
def llama_tokenizer(path: Path) -> Iterator[Tokenizer]:
    """Valid inside the context; skips where llama.cpp is missing."""
    require_engine("llamacpp")
    from brim.engine.llamacpp import log
    from brim.engine.llamacpp.binding import lib
    from brim.engine.llamacpp.tokenizer import LlamaTokenizer

    log.install()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"llama.cpp does not load {path}"
    try:
        yield LlamaTokenizer(lib.llama_model_get_vocab(model))
    finally:
        lib.llama_model_free(model)
