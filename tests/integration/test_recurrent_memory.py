"""A recurrent model's fixed states: the forecast beside what llama.cpp allocates for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import require_engine
from gguf import GGUFReader, GGUFWriter
from support.models import DEMO, plan_for

from brim.engine import factory
from brim.planner.memory import memory_terms
from brim.registry.describe import describe_gguf

NUM_LAYERS, HIDDEN_SIZE, INNER_SIZE, STATE_SIZE, KERNEL, TIME_STEP_RANK = 3, 128, 256, 64, 4, 8


def tokens_of(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields
    return {
        key: fields[f"tokenizer.ggml.{key}"].contents()
        for key in ("tokens", "token_type", "merges")
    }


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mamba of random weights with the demo model's vocabulary."""
    path = tmp_path_factory.mktemp("mamba") / "mamba-F32.gguf"
    vocabulary = tokens_of(DEMO)
    writer = GGUFWriter(path, "mamba")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(NUM_LAYERS)
    writer.add_ssm_conv_kernel(KERNEL)
    writer.add_ssm_inner_size(INNER_SIZE)
    writer.add_ssm_state_size(STATE_SIZE)
    writer.add_ssm_time_step_rank(TIME_STEP_RANK)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["token_type"])
    writer.add_token_merges(vocabulary["merges"])
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(vocabulary["tokens"]), HIDDEN_SIZE),
        "output_norm.weight": (HIDDEN_SIZE,),
    }
    for layer in range(NUM_LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN_SIZE,),
            f"blk.{layer}.ssm_in.weight": (2 * INNER_SIZE, HIDDEN_SIZE),
            f"blk.{layer}.ssm_conv1d.weight": (INNER_SIZE, KERNEL),
            f"blk.{layer}.ssm_conv1d.bias": (INNER_SIZE,),
            f"blk.{layer}.ssm_x.weight": (TIME_STEP_RANK + 2 * STATE_SIZE, INNER_SIZE),
            f"blk.{layer}.ssm_dt.weight": (INNER_SIZE, TIME_STEP_RANK),
            f"blk.{layer}.ssm_dt.bias": (INNER_SIZE,),
            f"blk.{layer}.ssm_a": (INNER_SIZE, STATE_SIZE),
            f"blk.{layer}.ssm_d": (INNER_SIZE,),
            f"blk.{layer}.ssm_out.weight": (HIDDEN_SIZE, INNER_SIZE),
        }
    random = np.random.default_rng(1)
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(0, 0.02, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("max_sequences", [1, 9])
def test_states_are_forecast_as_llamacpp_allocates_them(mamba: Path, max_sequences: int) -> None:
    """Every sequence's state is there from the start, and no KV besides."""
    require_engine("llamacpp")
    spec = describe_gguf(mamba)
    conv, state = (KERNEL - 1) * INNER_SIZE, STATE_SIZE * INNER_SIZE
    assert spec.recurrent_state_bytes == NUM_LAYERS * (conv + state) * 4
    terms = memory_terms(
        spec, engine="llamacpp", kv_tokens=2048, max_sequences=max_sequences, kv_type_k="f16",
        kv_type_v="f16", micro_batch_tokens=256, flash_attention=False, repack_weights=False,
    )  # fmt: skip
    engine = factory.create("llamacpp")
    engine.load(plan_for("llamacpp", path=mamba, exact=False, max_sequences=max_sequences))
    try:
        # Its log line has two decimals of a MiB.
        assert engine.footprint().kv_bytes == pytest.approx(terms.kv_bytes, abs=0.01 * 2**20)
    finally:
        engine.shutdown()
