"""A machine whose costs are known: samples as it would give them, and a calibration from them."""

from collections.abc import Callable

import msgspec

from brim.bench.calibrate.fit import fit_costs, fit_load
from brim.bench.calibrate.run import option_rates
from brim.core.calibration import (
    BandwidthSample,
    Calibration,
    LoadSample,
    LoadSetting,
    SpeedSample,
)
from brim.core.forecast import SpeedShape
from brim.core.machine import Conditions
from brim.core.model import KvLayer
from brim.planner.speed_terms import BITS_PER_WEIGHT, KvTypes, decode_terms, prefill_terms

DECODE_S = {
    "token": 2e-5, "layer": 2e-5, "bytes Q4_K": 4.6e-11, "bytes Q4_K repacked": 4.1e-11,
    "bytes Q6_K": 3.8e-11, "bytes Q8_0": 3.5e-11, "bytes F16": 3.2e-11,
    "scores f16/f16": 9e-11, "scores f16/f16 flash": 1.2e-10, "scores q8_0/f16 flash": 1.3e-10,
    "scores q8_0/q8_0 flash": 2.2e-10, "kv bytes": 3e-11,
}  # fmt: skip
"""Like those of a 2-core x86-64 VM."""

PREFILL_S = {
    "layer": 5e-4, "bytes Q4_K": 3.3e-12, "bytes Q4_K repacked": 7e-12, "bytes Q6_K": 2.7e-12,
    "bytes Q8_0": 7e-12, "bytes F16": 2.6e-12, "pass Q4_K": 8e-11, "row widths": 1e-8,
    "scores f16/f16": 2e-11, "scores f16/f16 flash": 1.5e-11, "scores q8_0/f16 flash": 4e-11,
    "scores q8_0/q8_0 flash": 8e-11,
}  # fmt: skip

BASE = LoadSetting(num_threads=1, num_batch_threads=2)

Disturb = Callable[[int], float]
"""Number of a sample -> by how much it took longer than the costs say."""


def shape(
    type_name: str = "Q4_K",
    *,
    num_layers: int = 3,
    hidden_size: int = 2048,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    key_dim: int = 64,
    feed_forward: int = 6144,
    vocab_size: int = 4096,
) -> SpeedShape:
    """A dense model with all matrices in one type."""
    queries, keys = num_heads * key_dim, num_kv_heads * key_dim
    in_layer = hidden_size * (2 * queries + 2 * keys + 3 * feed_forward)
    parameters = num_layers * in_layer + vocab_size * hidden_size
    num_bytes = int(parameters * BITS_PER_WEIGHT[type_name] / 8)
    return SpeedShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        key_dim=key_dim,
        vocab_size=vocab_size,
        active_bytes=num_bytes,
        weights_bytes=num_bytes,
        active_parameters=parameters,
        kv_layers=(KvLayer(key_width=keys, value_width=keys),) * num_layers,
        quant=type_name,
        matrix_bytes={type_name: num_bytes},
    )


ATTENTION = {"num_layers": 2, "hidden_size": 1024, "num_heads": 16, "feed_forward": 1024}


def samples(disturb: Disturb = lambda _: 1.0) -> list[SpeedSample]:
    """What timing the suite's kinds of stand-ins gives on this machine, in two rounds."""
    found: list[SpeedSample] = []

    def add(name: str, what: SpeedShape, setting: LoadSetting, prompt: int, depth: int) -> None:
        kv = KvTypes(setting.kv_type_k, setting.kv_type_v, setting.flash_attention)
        if prompt:
            terms = prefill_terms(
                what, kv=kv, repack_weights=setting.repack_weights, depth_tokens=depth,
                prompt_tokens=prompt, micro_batch_tokens=512,
            )  # fmt: skip
            seconds = sum(PREFILL_S.get(term, 0.0) * amount for term, amount in terms.items())
        else:
            terms = decode_terms(
                what, kv=kv, repack_weights=setting.repack_weights, depth_tokens=depth + 4
            )
            seconds = sum(DECODE_S.get(term, 0.0) * amount for term, amount in terms.items())
        seconds *= disturb(len(found))
        found.append(
            SpeedSample(
                model=name,
                shape=what,
                setting=setting,
                num_prompt=prompt,
                num_generate=0 if prompt else 8,
                depth=depth,
                samples_s=(seconds,) * 3,
            )
        )

    replace = msgspec.structs.replace
    for _ in range(2):
        for type_name in ("Q4_K", "Q6_K", "Q8_0", "F16"):
            for repack in (False, True) if type_name == "Q4_K" else (False,):
                for prompt in (0, 16, 128, 512):
                    setting = replace(BASE, repack_weights=repack)
                    add(f"wide-{type_name}", shape(type_name), setting, prompt, 0)
        thin = shape("Q8_0", num_layers=24, hidden_size=512, num_heads=8, feed_forward=1536)
        for prompt in (0, 16, 128, 512):
            add("thin", thin, BASE, prompt, 0)
        for key, value, flash in (
            ("f16", "f16", False), ("f16", "f16", True), ("q8_0", "f16", True),
            ("q8_0", "q8_0", True),
        ):  # fmt: skip
            setting = replace(BASE, kv_type_k=key, kv_type_v=value, flash_attention=flash)
            for num_kv_heads, key_dim in ((4, 64), (16, 64), (8, 128)):
                what = shape("Q8_0", num_kv_heads=num_kv_heads, key_dim=key_dim, **ATTENTION)
                for prompt, depth in ((0, 0), (0, 1024), (0, 4096), (512, 0), (512, 1024)):
                    add(f"attention-{num_kv_heads}", what, setting, prompt, depth)
    return found


def calibration(disturb: Disturb = lambda _: 1.0) -> Calibration:
    """The calibration that follows from `samples`."""
    measured = samples(disturb)
    loads = [
        LoadSample(
            model="x", weights_bytes=size, vocab_size=vocab, repacked_bytes=repacked,
            seconds=0.02 + vocab * 1e-6 + size / 10e9 + repacked / 2e9,
        )
        for size, vocab, repacked in (
            (10**8, 4096, 0), (3 * 10**8, 4096, 0), (10**8, 4096, 10**8), (10**8, 65536, 0),
        )
    ]  # fmt: skip
    return Calibration(
        machine="laptop",
        ram_bytes=16 * 2**30,
        performance_cores=2,
        engine="llamacpp",
        engine_version="1.2.3",
        measured_unix_s=1.8e9,
        duration_s=60.0,
        conditions=Conditions(),
        bandwidth=(
            BandwidthSample(num_threads=1, bytes_per_s=36e9),
            BandwidthSample(num_threads=2, bytes_per_s=45e9),
        ),
        base=BASE,
        options=tuple(option_rates(measured)),
        costs=fit_costs(measured),
        load=fit_load(loads, start_s=0.5, disk_bytes_per_s=1e9),
        samples=tuple(measured),
        load_samples=tuple(loads),
    )
