"""What only the llama.cpp engine promises: its own sizes, samplers in C, aborts, mapped weights."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgspec
import pytest
from support.driver import GREEDY, Run, feed, generate
from support.models import DEMO, plan_for, pystd_1m_gguf, quantised

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine.base import Engine
from brim.engine.llamacpp.binding import lib
from brim.engine.llamacpp.tokenizer import MAX_RUN_CHARACTERS
from brim.errors import BrimError, EngineError, InvalidRequest, ModelFileError, StoreError

MIB = 1024 * 1024

Load = Callable[[Plan], Engine]


def test_footprint_is_what_the_backend_allocated(load: Load) -> None:
    """Weights and KV come from the backend's own lines, to the rounding of its two decimals."""
    plan = plan_for("llamacpp", path=DEMO, kv_tokens=4096, max_sequences=4)
    footprint = load(plan).footprint()
    assert abs(footprint.weights_bytes - plan.model.weights_bytes) < 0.02 * MIB
    assert footprint.mapped_weights_bytes == footprint.weights_bytes
    # K and V of 2 heads of 64 in blocks of 34 bytes for 32 values, over 6 layers.
    expected_kv = 4096 * 6 * 2 * (2 * 64 // 32 * 34)
    assert abs(footprint.kv_bytes - expected_kv) < 0.02 * MIB
    assert footprint.compute_bytes > 0
    assert abs(footprint.output_bytes - 4 * 4 * 4096) < 0.02 * MIB


def test_repacking_moves_weights_out_of_the_map(load: Load) -> None:
    """With repacking part of the weights becomes anonymous, and engine and footprint say so."""
    plan = plan_for("llamacpp", path=quantised("Q4_0"), exact=False, repack_weights=True)
    engine = load(plan)
    footprint = engine.footprint()
    if footprint.mapped_weights_bytes == footprint.weights_bytes:
        pytest.skip("this processor has no repacked kernels for Q4_0")
    assert not engine.capabilities.maps_weights
    anonymous_bytes = footprint.weights_bytes - footprint.mapped_weights_bytes
    assert footprint.dirty_bytes >= anonymous_bytes + footprint.kv_bytes
    plain = load(plan_for("llamacpp", path=quantised("Q4_0"), exact=False))
    assert plain.capabilities.maps_weights


def test_weights_are_file_pages(load: Load) -> None:
    """The kernel's own map shows the model file mapped, without a private dirty copy."""
    engine = load(plan_for("llamacpp", path=DEMO))
    generate(engine, [5, 6, 7], 2)
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("no /proc/self/smaps on this system")
    blocks = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text())
    mapped = [block for block in blocks if str(DEMO) in block.partition("\n")[0]]
    assert mapped
    sizes = [dict(re.findall(r"(?m)^(\w+):\s+(\d+) kB", block)) for block in mapped]
    assert sum(int(size["Rss"]) for size in sizes) * 1024 > 0.5 * DEMO.stat().st_size
    assert sum(int(size["Private_Dirty"]) for size in sizes) == 0


def test_shrinking_the_pool_gives_memory_back(load: Load) -> None:
    """After resize_kv the process really holds less: measured, not computed."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc/self/statm on this system")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * 4096

    engine = load(plan_for("llamacpp", path=DEMO, kv_tokens=65536, kv_type="f16"))
    run = generate(engine, [5, 6, 7], 2)
    large, kv_bytes = resident(), engine.footprint().kv_bytes
    engine.resize_kv(1024)
    saved = kv_bytes - engine.footprint().kv_bytes
    assert saved > 180 * MIB
    assert large - resident() > 0.9 * saved
    feed(engine, run, [run.tokens[-1]])


def test_exports_lie_in_a_mapped_file(load: Load) -> None:
    """An exported block is file-backed, so the kernel may drop its pages instead of swapping."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps on this system")
    engine = load(plan_for("llamacpp", path=DEMO))
    run = generate(engine, [5, 6, 7], 2)
    block = engine.export_kv(run.seq_id)
    # "7f..-7f.. rw-s 00000000 fe:00 26723 /tmp/#26723 (deleted)": shared, with an inode.
    shared = [line.split() for line in maps.read_text().splitlines() if " rw-s " in line]
    assert any(int(fields[4]) != 0 and "(deleted)" in fields for fields in shared)
    block.release()


@pytest.mark.parametrize(
    "params",
    [
        {"dry_multiplier": 5.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01, "seed": 3, "temperature": 0.05},
    ],
    ids=["dry", "xtc"],
)
def test_c_samplers_change_the_draw(load: Load, params: dict[str, Any]) -> None:
    """DRY breaks a loop that greedy repeats; XTC drops the likeliest of several likely tokens."""
    engine = load(plan_for("llamacpp", path=DEMO))
    loop = engine.tokenizer.encode("a b c d " * 12, add_special=False, parse_special=False)
    plain = generate(engine, loop, 12)
    changed = generate(engine, loop, 12, SamplingParams(**{"temperature": 0.0, **params}))
    assert changed.tokens != plain.tokens


def test_huge_sampler_windows_are_bounded(load: Load) -> None:
    """A client's repeat_last_n of two thousand million does not allocate by it."""
    engine = load(plan_for("llamacpp"))
    huge = SamplingParams(
        repeat_penalty=1.1,
        repeat_last_n=2**31 - 1,
        dry_multiplier=1.0,
        dry_penalty_last_n=2**31 - 1,
    )
    assert len(generate(engine, [5, 6, 7], 3, huge).tokens) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_sequences": 257}, "257 sequences"),
        ({"max_sequences": 0}, "0 sequences"),
        ({"kv_type_k": "q9"}, "no KV type 'q9'"),
        ({"flash_attention": False}, "flash attention"),
        ({"micro_batch_tokens": 4096}, "micro-batch"),
    ],
)
def test_plans_that_would_abort_are_refused(
    load: Load, changes: dict[str, Any], message: str
) -> None:
    """Load options that llama.cpp aborts on, or drops silently, raise an error with the value."""
    plan = msgspec.structs.replace(plan_for("llamacpp"), **changes)
    with pytest.raises(EngineError, match=message):
        load(plan)


def test_a_file_that_llama_cpp_refuses_names_the_reason(load: Load, tmp_path: Path) -> None:
    """An architecture unknown to the backend, and a header it rejects, are one sentence each."""
    data = pystd_1m_gguf().read_bytes()
    unknown = tmp_path / "unknown.gguf"
    # Same length, so that every offset stays right.
    unknown.write_bytes(data.replace(b"llama", b"lxama"))
    spec = msgspec.structs.replace(plan_for("llamacpp").model, paths=(str(unknown),))
    with pytest.raises(ModelFileError, match="lxama"):
        load(msgspec.structs.replace(plan_for("llamacpp"), model=spec))


def rewritten(path: Path, changes: dict[str, Any], without: str = "-") -> Plan:
    """A plan for a copy of the 1 M model with other header values, at `path`."""
    reader = gguf.GGUFReader(pystd_1m_gguf())
    writer = gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        name = field.name
        if name.startswith(("GGUF.", without)) or name in {"general.architecture", *changes}:
            continue
        value_type = field.types[0]
        sub_type = field.types[-1] if value_type is gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), value_type, sub_type=sub_type)
    for name, value in changes.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plan = plan_for("llamacpp")
    spec = msgspec.structs.replace(plan.model, paths=(str(path),))
    return msgspec.structs.replace(plan, model=spec)


def test_a_rewritten_file_loads(load: Load, tmp_path: Path) -> None:
    """What the two tests below refuse is their change, not the rewriting."""
    load(rewritten(tmp_path / "same.gguf", {"general.name": "other"}))


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({"llama.attention.causal": False}, "-"),
        ({"tokenizer.ggml.model": "no_vocab"}, "tokenizer."),
    ],
    ids=["embedder", "no vocabulary"],
)
def test_files_that_cannot_continue_text_are_refused(
    load: Load, tmp_path: Path, changes: dict[str, Any], without: str
) -> None:
    """Models that load but would abort the process later are refused with a sentence."""
    with pytest.raises(ModelFileError, match="not a model that continues text"):
        load(rewritten(tmp_path / "broken.gguf", changes, without))


def test_a_pool_that_cannot_come_back_ends_the_engine(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When neither the new nor the old pool can be made, the error says to load again."""
    engine = load(plan_for("llamacpp"))
    generate(engine, [5, 6, 7], 2)
    monkeypatch.setattr(lib, "llama_init_from_model", lambda *_args: None)
    with pytest.raises(EngineError, match="loaded again"):
        engine.resize_kv(512)
    with pytest.raises(EngineError, match="not open"):
        feed(engine, Run(0), [1])


def test_a_long_run_without_spaces_is_refused(load: Load) -> None:
    """Text on which the backend's recursive tokenizer could overflow its stack never reaches it."""
    tokenizer = load(plan_for("llamacpp")).tokenizer
    with pytest.raises(InvalidRequest, match="break it up"):
        tokenizer.encode("a" * (MAX_RUN_CHARACTERS + 1), add_special=False, parse_special=False)
    spaced = "word " * (MAX_RUN_CHARACTERS // 4)
    assert tokenizer.encode(spaced, add_special=False, parse_special=False)


def test_dry_samplers_are_prepared_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences with the same DRY settings share the scan of the vocabulary, up to a bound."""
    engine = load(plan_for("llamacpp"))
    real = lib.llama_sampler_init_dry
    calls: list[float] = []

    def counted(vocab: object, multiplier: float, *args: object) -> object:
        calls.append(multiplier)
        return real(vocab, multiplier, *args)

    monkeypatch.setattr(lib, "llama_sampler_init_dry", counted)
    for _ in range(3):
        engine.close(engine.open(SamplingParams(dry_multiplier=0.8)))
    assert len(calls) == 1
    for number in range(20):
        engine.close(engine.open(SamplingParams(dry_multiplier=1.0 + number)))
    engine.close(engine.open(SamplingParams(dry_multiplier=0.8)))
    assert len(calls) == 22


def test_a_full_disk_is_an_error(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export for which the temporary file gets no blocks fails before anything is written."""
    engine = load(plan_for("llamacpp"))
    run = generate(engine, [5, 6, 7], 2)

    def refuse(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(StoreError, match="No space left"):
        engine.export_kv(run.seq_id)
    feed(engine, run, [run.tokens[-1]])


def test_backend_failures_become_our_errors(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every status of llama_decode maps to an error that ends the step and keeps the engine."""
    engine = load(plan_for("llamacpp"))
    run = Run(engine.open(GREEDY))
    real = lib.llama_decode
    for status in (1, 2, -1, -2, -3):
        monkeypatch.setattr(lib, "llama_decode", lambda *_args, status=status: status)
        with pytest.raises(BrimError) as caught:
            engine.step(StepPlan([Feed(run.seq_id, [1, 2])]))
        assert str(status) in str(caught.value) or status in (1, 2)
        monkeypatch.setattr(lib, "llama_decode", real)
        assert engine.num_tokens(run.seq_id) == 0
    feed(engine, run, [1, 2])


def test_a_prompt_of_special_text_round_trips(load: Load) -> None:
    """Encoding and decoding give the text back, special tokens are read only when asked."""
    tokenizer = load(plan_for("llamacpp")).tokenizer
    text = "naïve = 'λ→π' # 🙂\x00 end\n\t<|im_end|>"
    plain = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(plain) == text
    special = tokenizer.encode("<|im_end|>", add_special=False, parse_special=True)
    assert special == [2]
    assert tokenizer.piece(2) == b""
    assert tokenizer.piece(2, special=True) == b"<|im_end|>"
    assert tokenizer.eog_tokens == {0, 2}
