"""Asks the machine all questions at once, each in a thread of its own, and waits a bounded time.

A question that hangs, on a dead network share or a driver, is an answer as well: it says so in
`Facts.unread`, and holds nobody up.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from brim.config.places import runtime_directory, state_path
from brim.config.tree import Settings
from brim.core.cache import CacheOptions
from brim.doctor import builds, crashes, folders, processes, state_files
from brim.doctor.facts import Facts, GpuLimit, LocalModel, Rereads, ServedModel
from brim.errors import BrimError
from brim.machine.calibrations import calibrations_directory
from brim.machine.macos_calls import NativeCalls
from brim.machine.macos_formats import parse_sysctl_int
from brim.machine.reading import machine_at_hand, read_conditions, read_machine
from brim.prefix_cache.inspect import directory_stats
from brim.registry.sources import DEMO_PATH, list_local
from brim.runtime.worker_options import cache_directory

LIMIT_S = 2.0
"""Every question takes a second at most; who waits longer waits for something broken."""

REREADS_S = 1.0
"""For which it is watched what is read again, as long as between two looks of the governor."""

LIMITS_S = {"llamacpp": builds.CHILD_LIMIT_S + 1, "mlx": builds.CHILD_LIMIT_S + 1}
"""A backend's libraries are hundreds of megabytes, which a cold disk takes seconds to read."""

MIB = 1024 * 1024

Question = Callable[[], Any]


def questions(
    settings: Settings,
    *,
    served: Callable[[], Sequence[ServedModel]],
    stale_servers: Callable[[], Sequence[Path]],
    config_file: Path,
) -> dict[str, Question]:
    """One question for each field of `Facts`.

    Args:
        settings: Where things lie.
        served: Asks the running servers for their models.
        stale_servers: Files of servers that run no more.
        config_file: The settings' file.
    """
    state, cache = state_path(settings), cache_directory(settings.cache)
    # Forecasts lie in the platform's, whichever the server's is.
    states = list(dict.fromkeys((state, state_path(Settings()))))

    def folders_of_models() -> Any:
        return folders.read_folders([Path(path) for path in _model_files(served)])

    def permissions() -> Any:
        directories = [*states, runtime_directory(), cache]
        return state_files.read_permissions(directories, [config_file.parent, config_file])

    def stale() -> Any:
        directories = [*states, calibrations_directory()]
        return state_files.read_stale(directories, settings, stale_servers())

    return {
        "machine": read_machine,
        "conditions": read_conditions,
        "rereads": _rereads,
        "processes": processes.read_processes,
        "gpu": _gpu_limit,
        "folders": folders_of_models,
        "local_models": _local_models,
        "served": lambda: tuple(served()),
        "llamacpp": lambda: builds.read_build("llamacpp"),
        "mlx": lambda: builds.read_build("mlx"),
        "cache": lambda: directory_stats(_cache_options(settings)),
        "permissions": permissions,
        "crashes": lambda: crashes.read_crashes(state),
        "stale": stale,
    }


def gather(
    asked: Mapping[str, Question],
    *,
    limit_s: float = LIMIT_S,
    limits_s: Mapping[str, float] = LIMITS_S,
) -> Facts:
    """The answers to all questions, and why some have none.

    Args:
        asked: Field of `Facts` -> question.
        limit_s: How long each one may take.
        limits_s: Those that may take longer.
    """
    answers: dict[str, Any] = {}
    unread = dict.fromkeys(Facts.__struct_fields__, "nobody was asked")

    def answer(name: str, question: Question) -> None:
        try:
            answers[name] = question()
        except BrimError as exc:
            unread[name] = exc.message
        except Exception as exc:  # one question must not cost the answers to the others
            unread[name] = f"{type(exc).__name__}: {exc}"

    begin_s = time.monotonic()
    threads = {
        # Not a pool: its threads would be waited for at the end of the process.
        name: threading.Thread(target=answer, args=(name, question), daemon=True, name=name)
        for name, question in asked.items()
    }
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        limit = limits_s.get(name, limit_s)
        thread.join(max(0.0, begin_s + limit - time.monotonic()))
        if thread.is_alive():
            unread[name] = f"no answer within {limit:g} s"
    found = {name: value for name, value in dict(answers).items() if not threads[name].is_alive()}
    del unread["unread"]
    return Facts(**found, unread={n: why for n, why in unread.items() if n not in found})


def _rereads() -> Rereads:
    machine = machine_at_hand()
    before, began_s = machine.read_signals().refaulted_bytes, time.monotonic()
    if before is None:
        return Rereads()
    time.sleep(REREADS_S)
    after = machine.read_signals().refaulted_bytes
    span_s = time.monotonic() - began_s
    return Rereads(bytes_per_s=None if after is None else max(0, after - before) / span_s)


def _gpu_limit() -> GpuLimit:
    """Zero means the system's own choice."""
    wired = parse_sysctl_int(NativeCalls().sysctl("iogpu.wired_limit_mb"))
    return GpuLimit(wired_limit_bytes=wired * MIB if wired else None)


def _local_models() -> tuple[LocalModel, ...]:
    return tuple(
        LocalModel(reference=model.reference, spec=model.spec)
        for model in list_local()
        if model.spec is not None and model.reference != "demo"
    )


def _model_files(served: Callable[[], Sequence[ServedModel]]) -> list[str]:
    """Files of the models that are served and that lie in the hub's cache, without the demo's."""
    paths = [path for model in _local_models() for path in model.spec.paths]
    try:
        paths += [path for model in served() for path in model.plan.model.paths]
    except BrimError:  # a server that does not answer is another check's finding
        pass
    # Six megabytes that nobody could put elsewhere.
    return [path for path in paths if Path(path) != DEMO_PATH]


def _cache_options(settings: Settings) -> CacheOptions:
    """The cache's bounds, whether or not it is turned on."""
    cache = settings.cache
    return CacheOptions(
        directory=str(cache_directory(cache)),
        budget_bytes=cache.budget_bytes,
        daily_write_bytes=cache.daily_write_bytes,
        free_disk_floor_bytes=cache.free_disk_floor_bytes,
        max_inflight_bytes=cache.max_inflight_bytes,
        min_tokens=cache.min_tokens,
    )
