"""Where the tests' models are, and plans for them."""

import functools
import os
import tempfile
from pathlib import Path
from typing import Literal

from brim.core.memory import MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.registry.describe import describe_gguf
from brim.registry.describe_safetensors import describe_directory
from brim.registry.sources import TOY

TESTS = Path(__file__).parent.parent
PYSTD_1M = TESTS / "models" / "pystd-1m"
DEMO = TESTS.parent / "src" / "brim" / "registry" / "data" / "demo.gguf"

# The two trained models with their F16 files stand beside a checkout where they are at hand.
SHARED = Path(os.environ.get("BRIM_TEST_MODELS", TESTS.parent.parent / "shared" / "models"))

EXACT_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GGML_CPU_TILED_MM": "0"}


@functools.cache
def pystd_1m_gguf(quant: Literal["F16", "Q8_0"] = "Q8_0") -> Path:
    """The 1 M model as F16 GGUF, converted once a session."""
    from brim.registry.convert import convert_to_gguf

    path = Path(tempfile.mkdtemp(prefix="brim-test-")) / "pystd-1m-f16.gguf"
    convert_to_gguf(PYSTD_1M, path, quant)
    return path


@functools.cache
def quantised(quant: Literal["Q4_0"]) -> Path:
    """The 1 M model in a type that llama.cpp rearranges, by its own quantiser."""
    from brim.engine.llamacpp import log
    from brim.engine.llamacpp.binding import lib

    log.install()
    source = pystd_1m_gguf("F16")
    path = source.with_name(f"pystd-1m-{quant.lower()}.gguf")
    params = lib.llama_model_quantize_default_params()
    params.ftype = {"Q4_0": 2}[quant]
    assert lib.llama_model_quantize(str(source).encode(), str(path).encode(), params) == 0
    return path


def plan_for(
    engine: str,
    *,
    path: Path | None = None,
    exact: bool = True,
    context_tokens: int = 512,
    kv_tokens: int = 2048,
    max_sequences: int = 9,
    max_batch_tokens: int = 256,
    kv_type: str | None = None,
    flash_attention: bool | None = None,
    repack_weights: bool = False,
) -> Plan:
    """A plan written by hand, so that the contract does not depend on the planner's choices.

    `exact` gives llama.cpp the options under which results do not depend on the batch; MLX on a CPU
    needs none, and keeps its KV unquantised unless `kv_type` says otherwise.
    """
    is_exact_llama = exact and engine == "llamacpp"
    kv_type = kv_type or ("q8_0" if is_exact_llama else "f16")
    return Plan(
        model=_spec_for(engine, path),
        engine=engine,
        objective=Objective.MEMORY,
        context_tokens=context_tokens,
        kv_tokens=kv_tokens,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        micro_batch_tokens=min(512, max_batch_tokens),
        kv_type_k=kv_type,
        kv_type_v=kv_type,
        flash_attention=exact if flash_attention is None else flash_attention,
        repack_weights=repack_weights,
        num_threads=2,
        num_batch_threads=2,
        environment=EXACT_ENVIRONMENT if is_exact_llama else {"OMP_WAIT_POLICY": "passive"},
        memory=MemoryTerms(weights_bytes=0, kv_bytes=0, compute_bytes=0, overhead_bytes=0),
        reasons={},
    )


def _spec_for(engine: str, path: Path | None) -> ModelSpec:
    if engine == "toy":
        return TOY
    if engine == "mlx":
        return describe_directory(path or PYSTD_1M)
    return describe_gguf(path or pystd_1m_gguf())
