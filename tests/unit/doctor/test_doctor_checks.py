"""Each check over recorded facts: well, and each thing that it is there to find."""

from typing import Any

import msgspec
import pytest
from support.doctor_facts import CACHE, GIB, MAC, METAL, WELL, conditions, find, served

from brim.core.event import Event, EventKind
from brim.core.machine import Pressure, ThermalState
from brim.doctor.facts import (
    Build,
    Crashes,
    Folder,
    GpuLimit,
    LocalModel,
    OtherServer,
    Permission,
    Processes,
    Program,
    Rereads,
    StaleState,
)
from brim.doctor.finding import Verdict
from brim.doctor.registry import CHECKS, examine
from brim.prefix_cache.inspect import ModelUse
from brim.registry.sources import TOY

OK, NOTE, WARNING, PROBLEM = Verdict.OK, Verdict.NOTE, Verdict.WARNING, Verdict.PROBLEM


def machine(**changes: Any) -> dict[str, Any]:
    return {"machine": msgspec.structs.replace(MAC, **changes)}


def cache(**changes: Any) -> dict[str, Any]:
    return {"cache": msgspec.structs.replace(CACHE, **changes)}


def folder(**fields: Any) -> dict[str, Any]:
    return {"folders": (Folder(path="/m", **({"file_system": "apfs"} | fields)),)}


def programs(**fields: Any) -> dict[str, Any]:
    return {"processes": Processes(**fields)}


def llamacpp(build: Build | None, **changes: Any) -> dict[str, Any]:
    builds = (build,) if build is not None else ()
    assert WELL.llamacpp is not None
    return {"llamacpp": msgspec.structs.replace(WELL.llamacpp, builds=builds, **changes)}


def mlx(build: Build | None, **changes: Any) -> dict[str, Any]:
    builds = (build,) if build is not None else ()
    assert WELL.mlx is not None
    return {"mlx": msgspec.structs.replace(WELL.mlx, builds=builds, **changes)}


def permission(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "path": "/s/apps.sqlite", "is_directory": False, "mode": 0o600, "is_own": True,
        "is_writable": True, "is_secret": True,
    }  # fmt: skip
    return {"permissions": (Permission(**(fields | changes)),)}


def crashes(**fields: Any) -> dict[str, Any]:
    return {"crashes": Crashes(**fields)}


def died(*models: str, kind: EventKind = EventKind.WORKER_DIED) -> dict[str, Any]:
    events = tuple(Event(at_unix_s=1.0, kind=kind, model=m, cause="signal 9") for m in models)
    return crashes(worker_events=events)


def local(**fields: Any) -> dict[str, Any]:
    spec = msgspec.structs.replace(TOY, **fields)
    return {"local_models": (LocalModel(reference="hf:a/b", spec=spec),)}


CHROME = Program(
    name="Google Chrome.app", num_processes=31, dirty_bytes=12 * GIB, resident_bytes=14 * GIB
)
OLLAMA = OtherServer(name="Ollama", pid=42, held_bytes=9 * GIB, stop="ollama stop MODEL")
TELLS_NOTHING = {
    "pressure": None, "thermal": None, "compressor_ratio": None, "swap_used_bytes": None,
    "is_low_power": None, "is_on_battery": None, "battery_percent": None,
}  # fmt: skip


def felt(**changes: Any) -> dict[str, Any]:
    return {"conditions": conditions(**changes)}


def reread(mb_per_s: float, *, available_bytes: int = 2 * GIB) -> dict[str, Any]:
    return {"rereads": Rereads(bytes_per_s=mb_per_s * 1e6)} | felt(available_bytes=available_bytes)


LINUX = {"system": "linux", "architecture": "x86_64", "has_gpu": False}

CASES: list[tuple[str, dict[str, Any], Verdict, str]] = [
    ("headroom", {}, OK, "33.60 GiB of 48.00 GiB fit comfortably (0.70 x ram)"),
    ("headroom", machine(others_bytes=44 * GIB), WARNING, "others use 44.00 GiB"),
    ("headroom", machine(others_bytes=47 * GIB), PROBLEM, "0 MiB at most"),
    ("headroom", machine(others_bytes=47 * GIB) | programs(own_bytes=30 * GIB), OK, "0 MiB"),
    ("programs", {}, OK, "no other program"),
    ("programs", programs(programs=(CHROME,)), NOTE, "Google Chrome.app 12.00 GiB in 31 processes"),
    ("swap", {}, OK, "0 MiB in swap"),
    ("swap", felt(swap_used_bytes=GIB), NOTE, "1.00 GiB in swap"),
    ("swap", felt(swap_used_bytes=9 * GIB), WARNING, "9.00 GiB in swap"),
    ("swap", felt(**TELLS_NOTHING), NOTE, "does not say"),
    ("re-reads", {}, OK, "does not count"),
    ("re-reads", reread(29), OK, "29 MB/s of dropped files"),
    ("re-reads", reread(30), WARNING, "30 MB/s"),
    ("re-reads", reread(1200), PROBLEM, "1200 MB/s of dropped files are read again"),
    ("re-reads", reread(1200, available_bytes=12 * GIB), NOTE, "with 12"),
    ("pressure", {}, OK, "normal"),
    ("pressure", felt(pressure=Pressure.WARNING), WARNING, "reports warning pressure"),
    ("pressure", felt(pressure=Pressure.CRITICAL), PROBLEM, "reports critical pressure"),
    ("pressure", felt(compressor_ratio=0.8), WARNING, "compressed pages are 0.80"),
    ("pressure", felt(pressure=None, stalled_percent=0.0), OK, "waited for memory 0 %"),
    ("pressure", felt(pressure=None, stalled_percent=7.0), NOTE, "waited for memory 7 %"),
    ("pressure", felt(pressure=None, stalled_percent=40.0), PROBLEM, "waited for memory 40 %"),
    (
        "pressure",
        felt(pressure=None, stalled_percent=40.0, available_bytes=64 * GIB),
        NOTE,
        "40 % of the last 10 s, with 64.00 GiB free",
    ),
    ("pressure", felt(pressure=None, available_bytes=GIB), WARNING, "1.00 GiB can be taken"),
    ("pressure", felt(available_bytes=GIB), OK, "normal"),
    ("pressure", felt(**TELLS_NOTHING), OK, "does not say"),
    ("other-servers", {}, OK, "none runs"),
    ("other-servers", programs(other_servers=(OLLAMA,)), WARNING, "Ollama holds 9.00 GiB"),
    (
        "other-servers",
        programs(other_servers=(msgspec.structs.replace(OLLAMA, held_bytes=GIB // 8),)),
        NOTE, "Ollama holds 0.12 GiB",
    ),
    (
        "other-servers",
        programs(other_servers=(msgspec.structs.replace(OLLAMA, pid=None, held_bytes=0),)),
        NOTE, "Ollama answers",
    ),
    ("wired-limit", {}, OK, "own limit"),
    ("wired-limit", {"gpu": GpuLimit(wired_limit_bytes=36 * GIB)}, WARNING, "36.00 GiB of 48.0"),
    ("wired-limit", {"gpu": GpuLimit(wired_limit_bytes=46 * GIB)}, PROBLEM, "46.00 GiB of 48.0"),
    ("heat", {}, OK, "nominal"),
    ("heat", felt(thermal=ThermalState.MODERATE), NOTE, "moderate"),
    ("heat", felt(thermal=ThermalState.HEAVY), WARNING, "heavy"),
    ("heat", felt(thermal=ThermalState.TRAPPING), PROBLEM, "trapping"),
    ("heat", felt(is_throttled=True), WARNING, "throttled"),
    ("heat", felt(thermal=None, hottest_celsius=97.0), WARNING, "97 °C"),
    ("heat", felt(thermal=None, hottest_celsius=51.0), OK, "51 °C"),
    ("heat", felt(**TELLS_NOTHING), OK, "does not say"),
    ("low-power", {}, OK, "off"),
    ("low-power", felt(is_low_power=True), WARNING, "on"),
    ("low-power", felt(**TELLS_NOTHING), OK, "no such mode"),
    ("battery", {}, OK, "on mains power"),
    ("battery", felt(is_on_battery=True, battery_percent=80), NOTE, "on battery at 80 %"),
    ("battery", felt(is_on_battery=True, battery_percent=9), WARNING, "on battery at 9 %"),
    ("battery", felt(**TELLS_NOTHING), OK, "no battery"),
    ("served-models", {}, OK, "no server runs"),
    ("served-models", {"served": (served(),)}, OK, "served: toy"),
    (
        "served-models", {"served": None, "unread": {"served": "pid 7 gives no answer"}},
        PROBLEM, "pid 7 gives no answer",
    ),
    ("served-models", {"served": (served(num_deaths=2),)}, NOTE, "toy (2)"),
    (
        "served-models", {"served": (served(is_quarantined=True, reason="it died 3 times"),)},
        PROBLEM, "toy: it died 3 times",
    ),
    ("search-index", {}, OK, "no folder of models is indexed"),
    ("search-index", programs(indexers=("mds_stores",)), NOTE, "mds_stores works now"),
    ("search-index", folder(is_indexed=True), NOTE, "indexes /m"),
    (
        "search-index", folder(is_indexed=True) | programs(indexers=("mds_stores",)),
        WARNING, "indexes /m, and mds_stores works now",
    ),
    ("model-disk", {}, OK, "/Users/x/models reads 5000 MB/s"),
    ("model-disk", {"folders": ()}, OK, "no model lies here"),
    ("model-disk", folder(file_system="smbfs"), PROBLEM, "/m (smbfs) is on the network"),
    ("model-disk", folder(file_system="nfs4"), PROBLEM, "/m (nfs4) is on the network"),
    ("model-disk", folder(read_bytes_per_s=120e6), WARNING, "/m reads 120 MB/s"),
    ("model-disk", folder(is_rotational=True), WARNING, "on a hard disk"),
    ("model-disk", folder(is_rotational=True, read_bytes_per_s=2e9), OK, "2000 MB/s"),
    ("context-use", {}, OK, "far above"),
    (
        "context-use",
        {"served": (served(
            context_tokens=65536, kv_bytes=8 * GIB, num_answers=50, num_prompt_tokens=20_000,
            num_completion_tokens=5_000,
        ),)},
        NOTE, "toy has 65536 tokens and requests of 500 on average: 7.51 GiB of KV too much",
    ),
    (
        "context-use",
        {"served": (served(context_tokens=65536, kv_bytes=8 * GIB, num_answers=2),)}, OK, "far",
    ),
    (
        "context-use",
        {"served": (served(
            context_tokens=4096, kv_bytes=8 * GIB, num_answers=50, num_prompt_tokens=50_000,
        ),)},
        OK, "far above",
    ),
    ("quant-floor", {}, OK, "none is below"),
    ("quant-floor", local(quant="Q4_0"), OK, "none is below"),
    ("quant-floor", local(quant="Q3_K_M"), NOTE, "toy is Q3_K_M: KLD 0.1019, perplexity +10.5 %"),
    ("quant-floor", {"served": (served(model={"quant": "Q2_K"}),)}, WARNING, "toy is Q2_K"),
    ("quant-floor", local(quant="MLX 3bit"), NOTE, "toy is MLX 3bit"),
    ("kv-type", {}, OK, "can be had"),
    (
        "kv-type", local(format="gguf", key_dim=80, value_dim=80), NOTE,
        "q8_0 KV cannot be had for toy (heads of 80 values are no whole blocks of 32)",
    ),
    (
        "kv-type", local(format="safetensors", key_dim=80, value_dim=80), NOTE,
        "q8_0 KV cannot be had for toy (",
    ),
    (
        "kv-type", {"served": (served(kv_type_v="q8_0", flash_attention=False),)}, PROBLEM,
        "toy has a q8_0 V cache without flash attention",
    ),
    ("llamacpp-build", {}, OK, "llama-cpp-python 0.3.36, with GPU, native instructions"),
    ("llamacpp-build", llamacpp(None), NOTE, "not installed"),
    (
        "llamacpp-build", llamacpp(msgspec.structs.replace(METAL, has_gpu=False)), PROBLEM,
        "was built without Metal",
    ),
    (
        "llamacpp-build", llamacpp(METAL, architecture="x86_64", is_translated=True), PROBLEM,
        "runs translated",
    ),
    (
        "llamacpp-build", llamacpp(Build(engine="llamacpp", problem="no symbol")), PROBLEM,
        "does not start: no symbol",
    ),
    (
        "llamacpp-build",
        llamacpp(
            Build(engine="llamacpp", version="1", features=("SSE3",)),
            cpu_features=("avx2", "fma", "avx512f"), **LINUX,
        ),
        WARNING, "was built without AVX2, FMA, AVX512, which the processor has",
    ),
    (
        "llamacpp-build",
        llamacpp(
            Build(engine="llamacpp", version="1", features=("AVX2",)),
            cpu_features=("avx2", "avx512f"), **LINUX,
        ),
        NOTE, "was built without AVX512",
    ),
    (
        "llamacpp-build",
        llamacpp(Build(engine="llamacpp", version="1"), **(LINUX | {"has_gpu": True})),
        NOTE, "there is a GPU",
    ),
    ("mlx-build", {}, OK, "mlx 0.32.4, with Metal"),
    ("mlx-build", mlx(None), NOTE, "not installed"),
    ("mlx-build", mlx(None, **LINUX), OK, "not installed"),
    (
        "mlx-build", mlx(Build(engine="mlx", version="1")), PROBLEM, "mlx 1 finds no Metal",
    ),
    ("mlx-build", mlx(Build(engine="mlx", problem="no libmlx")), PROBLEM, "no libmlx"),
    ("mlx-build", mlx(Build(engine="mlx", version="1"), **LINUX), OK, "on the processor"),
    ("free-disk", {}, OK, "200.00 GiB free"),
    ("free-disk", cache(free_disk_bytes=9 * GIB), WARNING, "no prompt is kept on disk"),
    ("free-disk", cache(free_disk_bytes=15 * GIB), NOTE, "have room for 6.00 GiB"),
    ("free-disk", cache(budget_bytes=0, free_disk_bytes=GIB), OK, "the prefix cache is off"),
    ("cache-budget", {}, OK, "1.00 GiB of 16.00 GiB in 3 entries"),
    ("cache-budget", cache(entry_bytes=20 * GIB), WARNING, "more than it may"),
    ("cache-budget", cache(written_bytes_today=64 * GIB), NOTE, "nothing more is kept"),
    (
        "cache-budget",
        cache(models=(ModelUse(
            model="m", directory="d", num_entries=3, entry_bytes=GIB, is_removed=True
        ),)),
        NOTE, "1.00 GiB of models that are gone",
    ),
    ("permissions", {}, OK, "1 files and directories"),
    ("permissions", permission(mode=0o644), PROBLEM, "can be read by others"),
    ("permissions", permission(mode=0o644, is_shielded=True), OK, "user's alone"),
    ("permissions", permission(mode=0o777, is_secret=False), PROBLEM, "can be written by others"),
    ("permissions", permission(is_own=False), PROBLEM, "belongs to another user"),
    ("permissions", permission(is_writable=False), PROBLEM, "cannot be written"),
    ("worker-deaths", {}, OK, "none in seven days"),
    ("worker-deaths", died("a"), NOTE, "1 death of a's worker; last: signal 9"),
    ("worker-deaths", died("a", "a", "a"), WARNING, "3 deaths of a's worker"),
    ("worker-deaths", died("a", kind=EventKind.MODEL_QUARANTINED), WARNING, "a went into quar"),
    ("worker-deaths", died("a", kind=EventKind.UNLOAD_FAILED), NOTE, "memory of a did not come"),
    ("kernel-panics", {}, OK, "none in 30 days"),
    ("kernel-panics", crashes(panics=("p.panic",)), PROBLEM, "1 panic in the GPU's memory"),
    ("kernel-panics", crashes(other_panics=("p.panic",)), NOTE, "of another kind"),
    ("oom-kills", {}, OK, "counts none"),
    ("oom-kills", crashes(num_oom_kills=0), OK, "none"),
    ("oom-kills", crashes(num_oom_kills=2), NOTE, "killed 2 processes"),
    (
        "oom-kills", crashes(num_oom_kills=None, oom_victims=("python3 (pid 7)",)), WARNING,
        "killed 1 process for want of memory in seven days: python3 (pid 7)",
    ),
    ("stale-state", {}, OK, "nothing was left behind"),
    ("stale-state", {"stale": StaleState(orphans=(7, 8))}, PROBLEM, "2 workers of a server"),
    ("stale-state", {"stale": StaleState(damaged=("/s/x.damaged",))}, NOTE, "put aside"),
    ("stale-state", {"stale": StaleState(files=("/r/server-1.json",))}, NOTE, "1 file of servers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "changes", "verdict", "words"),
    CASES,
    ids=[f"{check}-{verdict}-{i}" for i, (check, _, verdict, _) in enumerate(CASES)],
)
def test_a_check_finds_what_it_is_there_for(
    check: str, changes: dict[str, Any], verdict: Verdict, words: str
) -> None:
    """It judges the facts, says them, and has a way out of whatever is not well."""
    finding = find(check, **changes)
    assert (finding.verdict, finding.check) == (verdict, check)
    assert words in finding.found
    assert finding.mend or verdict in (OK, NOTE)


def test_every_check_is_tested_well_and_not() -> None:
    """Each has a case in which all is well and one in which it is not."""
    names = {check.name for check in CHECKS}
    assert {case[0] for case in CASES if case[2] is OK} == names
    assert {case[0] for case in CASES if case[2] is not OK} == names


def test_nothing_is_wrong_with_a_machine_on_which_all_is_well() -> None:
    """No check finds anything there."""
    assert {finding.verdict for finding in examine(WELL)} == {OK}


def test_what_could_not_be_read_is_a_note_with_the_reason() -> None:
    """Of each check that needs it, and of no other."""
    unread = {"conditions": "no answer within 2 s"}
    findings = examine(msgspec.structs.replace(WELL, conditions=None, unread=unread))
    noted = {finding.check for finding in findings if finding.verdict is NOTE}
    assert noted == {"swap", "pressure", "re-reads", "heat", "low-power", "battery"}
    assert "could not be checked: no answer within 2 s" in {f.found for f in findings}


def test_names_of_checks_differ() -> None:
    """A finding names one check."""
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
