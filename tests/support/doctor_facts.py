"""Facts of machines in every state, for checks that ask nothing themselves."""

from typing import Any

import msgspec

from brim.core.machine import Conditions, MachineSpec, Pressure, ThermalState
from brim.core.memory import MemoryTerms
from brim.core.plan import Objective, Plan
from brim.doctor.facts import (
    Build,
    Builds,
    Crashes,
    Facts,
    Folder,
    GpuLimit,
    Permission,
    Processes,
    Rereads,
    ServedModel,
    StaleState,
)
from brim.doctor.finding import Finding, finding_of
from brim.doctor.registry import CHECKS
from brim.prefix_cache.inspect import DirectoryStats
from brim.registry.sources import TOY

GIB = 2**30

MAC = MachineSpec(
    name="Apple M5 Pro", system="darwin", ram_bytes=48 * GIB, others_bytes=10 * GIB,
    gpu_limit_bytes=40_200_896_512,
)  # fmt: skip

CALM = Conditions(
    pressure=Pressure.NORMAL,
    compressor_ratio=0.096,  # of the recorded vm_stat of this machine
    swap_used_bytes=0,
    thermal=ThermalState.NOMINAL,
    is_low_power=False,
    is_on_battery=False,
    battery_percent=100,
    sources={"is_low_power": "pmset -g: lowpowermode"},
)

CACHE = DirectoryStats(
    directory="/c", num_entries=3, entry_bytes=GIB, budget_bytes=16 * GIB, written_bytes_today=0,
    daily_write_bytes=64 * GIB, free_disk_bytes=200 * GIB, free_disk_floor_bytes=10 * GIB,
    models=(),
)  # fmt: skip

METAL = Build(
    engine="llamacpp", version="0.3.36", has_gpu=True, features=("NEON", "DOTPROD", "MATMUL_INT8")
)

WELL = Facts(
    machine=MAC,
    conditions=CALM,
    rereads=Rereads(),
    processes=Processes(),
    gpu=GpuLimit(),
    folders=(
        Folder(path="/Users/x/models", file_system="apfs", is_indexed=False, read_bytes_per_s=5e9),
    ),
    local_models=(),
    served=(),
    llamacpp=Builds(
        builds=(METAL,), system="darwin", architecture="arm64",
        cpu_features=("asimddp", "i8mm"), has_gpu=True,
    ),
    mlx=Builds(
        builds=(Build(engine="mlx", version="0.32.4", has_gpu=True),), system="darwin",
        architecture="arm64", has_gpu=True,
    ),
    cache=CACHE,
    permissions=(
        Permission(
            path="/s", is_directory=True, mode=0o700, is_own=True, is_writable=True, is_secret=False
        ),
    ),
    crashes=Crashes(),
    stale=StaleState(),
)  # fmt: skip
"""A Mac on which everything is well."""


def find(check: str, facts: Facts = WELL, **changes: Any) -> Finding:
    """What one check says of these facts, some of them changed."""
    [one] = [each for each in CHECKS if each.name == check]
    return finding_of(one, msgspec.structs.replace(facts, **changes))


def conditions(**changes: Any) -> Conditions:
    return msgspec.structs.replace(CALM, **changes)


def served(*, context_tokens: int = 8192, kv_bytes: int = GIB, **fields: Any) -> ServedModel:
    """A model that is served, with its plan."""
    model = msgspec.structs.replace(TOY, **fields.pop("model", {}))
    plan = Plan(
        model=model, engine="llamacpp", objective=Objective.DECODE, context_tokens=context_tokens,
        kv_tokens=context_tokens, max_sequences=4, max_batch_tokens=512, micro_batch_tokens=512,
        kv_type_k="f16", kv_type_v=fields.pop("kv_type_v", "f16"),
        flash_attention=fields.pop("flash_attention", True), repack_weights=False, num_threads=2,
        num_batch_threads=2, environment={}, reasons={},
        memory=MemoryTerms(
            weights_bytes=0, kv_bytes=kv_bytes, compute_bytes=0, overhead_bytes=0
        ),
    )  # fmt: skip
    return ServedModel(plan=plan, **fields)
