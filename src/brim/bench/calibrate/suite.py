"""What is timed, in which order: jobs by wait policy, each a stand-in under one setting.

Loads are cheap beside reading prompts, so decode is timed under every number of threads, prompts
only under the number that reads them.  A KV cache once filled is kept and imported by later jobs.
"""

from collections.abc import Iterator

import msgspec

from brim.bench.calibrate import standins
from brim.core.calibration import LoadSetting
from brim.core.machine import MachineSpec
from brim.planner.options import SPINNING

PROMPTS = (16, 128, 512)
"""A few rows (several sequences that decode), a short prompt, and a full micro-batch."""

MICRO_BATCHES = (128, 256, 1024)
"""Beside the base's 512."""

LONG_PROMPT = 1024
"""Holds one micro-batch of the largest size, and several of the others."""

NUM_GENERATE = 12
"""Tokens of each timed decode: a tenth of a second at the stand-ins' sizes; the median of them
ignores a burst of others' work."""

KV_DEPTHS = (0, 1024, 2048)
"""Two distances to fit a straight line through, at which quantised types still fill in seconds."""

DEEP = (0, standins.MAX_DEPTH)
"""For f16, which fills fast: 67 MB of KV in the ungrouped stand-in, beyond any cache."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One load and what is timed on it."""

    model: str
    setting: LoadSetting
    prompts: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    num_generate: int = NUM_GENERATE
    kept_kv: str = ""
    """Names the filled KV, for jobs that differ in threads alone."""
    fills: bool = False
    """Whether it is the first of them, which has to fill it."""

    @property
    def weight(self) -> float:
        """Roughly its seconds on a slow machine, for telling how long the rest will take.

        A load and its decodes take 0.15 s, a token that is read 0.7 ms (2-core x86-64 VM).
        """
        fills = max(self.depths, default=0) if self.fills else 0
        return 0.15 + 0.0007 * (sum(self.prompts) + max(self.prompts, default=0) + fills)

    @property
    def num_tokens(self) -> int:
        """The longest sequence."""
        return max((*self.prompts, *(depth + 64 for depth in self.depths), 1))


def base_setting(machine: MachineSpec) -> LoadSetting:
    """The setting that others are compared with; threads as the planner chooses them."""
    cores = machine.performance_cores
    if machine.gpu_limit_bytes is not None:
        return LoadSetting(num_threads=max(1, cores - 1), num_batch_threads=cores)
    return LoadSetting(num_threads=cores, num_batch_threads=cores, wait_policy=SPINNING)


def settings(machine: MachineSpec) -> list[LoadSetting]:
    """The combinations of threads and waiting under which everything is decoded, base first.

    Where a GPU computes, threads only wait for it: one combination.
    """
    base = base_setting(machine)
    if machine.gpu_limit_bytes is not None:
        return [base]
    replace = msgspec.structs.replace
    cores = machine.performance_cores
    # Fewer than all is what the engine falls back to beside busy programs.
    counts = dict.fromkeys((cores, max(1, cores - 1), 1))
    found = [replace(base, num_threads=count) for count in counts]
    # A single thread waits for nobody.
    found += [replace(base, num_threads=n, wait_policy="passive") for n in counts if n > 1]
    return found


def jobs(machine: MachineSpec) -> list[Job]:
    """Everything that is timed, ordered so that jobs of one wait policy follow each other."""
    found: list[Job] = []
    base, on_gpu = base_setting(machine), machine.gpu_limit_bytes is not None
    for setting in settings(machine):
        is_base = setting == base
        found += _weights_jobs(setting, on_gpu, reads_prompts=is_base)
        found += _attention_jobs(setting, fills=is_base)
        if setting.wait_policy != base.wait_policy and not any(
            job.prompts and job.setting.wait_policy == setting.wait_policy for job in found
        ):
            found.append(Job(model=standins.wide("Q4_K"), setting=setting, prompts=PROMPTS[1:]))
        if is_base:
            found += _micro_batch_jobs(setting)
    return found


def _weights_jobs(setting: LoadSetting, on_gpu: bool, *, reads_prompts: bool) -> Iterator[Job]:
    prompts = PROMPTS if reads_prompts else ()
    for type_name in standins.WIDE_TYPES:
        # Only a CPU has weights rearranged for it.
        for repack in (False,) if on_gpu else (False, True):
            yield Job(
                model=standins.wide(type_name),
                setting=msgspec.structs.replace(setting, repack_weights=repack),
                prompts=prompts,
                depths=(0,),
            )
    for name in (standins.THIN, standins.TINY, standins.HEAD):
        yield Job(model=name, setting=setting, prompts=prompts, depths=(0,))


def _attention_jobs(setting: LoadSetting, *, fills: bool) -> Iterator[Job]:
    def job(model: str, key: str, value: str, flash: bool, depths: tuple[int, ...]) -> Job:
        changed = msgspec.structs.replace(
            setting, kv_type_k=key, kv_type_v=value, flash_attention=flash
        )
        return Job(
            model=model,
            setting=changed,
            depths=depths,
            num_generate=8,
            fills=fills,
            kept_kv=f"{model}-{key}-{value}-{int(flash)}",
        )

    for key, value, flash in (
        ("f16", "f16", True), ("f16", "f16", False), ("q8_0", "f16", True), ("q8_0", "f16", False),
        ("q8_0", "q8_0", True), ("q4_0", "q4_0", True),
    ):  # fmt: skip
        yield job(standins.GROUPED, key, value, flash, KV_DEPTHS)
    for flash in (True, False):
        yield job(standins.UNGROUPED, "f16", "f16", flash, DEEP)
        yield job(standins.BROAD, "f16", "f16", flash, KV_DEPTHS[:2])
    yield job(standins.BROAD, "q8_0", "q8_0", True, KV_DEPTHS[:2])


def _micro_batch_jobs(setting: LoadSetting) -> Iterator[Job]:
    for num_rows in (setting.micro_batch_tokens, *MICRO_BATCHES):
        changed = msgspec.structs.replace(setting, micro_batch_tokens=num_rows)
        yield Job(model=standins.wide("Q4_K"), setting=changed, prompts=(LONG_PROMPT,))
