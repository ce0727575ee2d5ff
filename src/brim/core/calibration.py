"""What `brim calibrate` measured of one machine and one engine, and the costs fitted to it.

Values only: `bench.calibrate` measures and fits, `machine.calibrations` keeps the files,
`planner.calibrated_speed` forecasts from the costs, and `planner.options` compares load options by
the rates in `options`.
"""

import statistics

import msgspec

from brim.core.forecast import SpeedShape
from brim.core.machine import Conditions

FORMAT_VERSION = 2
"""Of the file; a calibration of another version is measured again, never converted."""

WAIT_POLICIES: dict[str, dict[str, str]] = {
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "spin3000": {"GOMP_SPINCOUNT": "3000"},
}
"""How threads wait for each other, by name: what stands in the engine's environment.

3,000 turns are some 50 us: longer than nearly all waits of an idle machine (1 sleep a token, and
45 tok/s; 94 sleeps and 42 tok/s with 300 turns; 400 and 30 when passive), shorter by far than a
time slice, so that a token beside busy processes takes 65 ms at worst, for as long as
`engine.llamacpp.threads` tries it.  OpenMP's default, spinning for milliseconds, takes 400 to 1,650
(1.24 B Q4_K_M, 2-core x86-64 VM, November 2026, benches/contention.py).
"""

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Has GNU's C library ask Linux for huge pages, where rearranged weights and KV then lie.

Every token reads them all, and page walks cost 5 % of its time: 41.5 tok/s against 39.3 through the
server, for 18 MB more of 1.5 GB (1.24 B Q4_K_M, 2-core x86-64 VM, November 2026).  Systems without
that library, or that grant no huge pages, pass over it.
"""


def wait_policy_of(environment: dict[str, str]) -> str:
    """The name of the wait policy that an engine's environment sets.

    Raises:
        ValueError: It sets none of `WAIT_POLICIES`.

    Example:
        >>> wait_policy_of({"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"})
        'passive'
    """
    for name, settings in WAIT_POLICIES.items():
        if settings.items() <= environment.items():
            return name
    raise ValueError(f"no known wait policy in {environment}")


class LoadSetting(msgspec.Struct, frozen=True, kw_only=True):
    """The load options that decide speed; hashable, so that measurements group by it."""

    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    flash_attention: bool = True
    repack_weights: bool = False
    micro_batch_tokens: int = 512
    num_threads: int = 1
    """Of a step with one row."""
    num_batch_threads: int = 1
    """Of a step with more rows."""
    wait_policy: str = "passive"
    """A name in `WAIT_POLICIES`."""


class BandwidthSample(msgspec.Struct, frozen=True, kw_only=True):
    """Read bandwidth of the memory as seen by some threads at once."""

    num_threads: int
    bytes_per_s: float


class SpeedSample(msgspec.Struct, frozen=True, kw_only=True):
    """One thing timed on a stand-in: a prompt read, or tokens decoded, at a depth."""

    model: str
    """The stand-in's name."""
    shape: SpeedShape
    setting: LoadSetting
    num_prompt: int = 0
    """Tokens of the timed prompt; 0 where decode was timed."""
    num_generate: int = 0
    """Tokens decoded; 0 where a prompt was timed."""
    depth: int = 0
    """Tokens in the sequence before, not timed."""
    samples_s: tuple[float, ...]
    """Seconds of each repetition; of decode, for one token."""

    @property
    def seconds(self) -> float:
        """Median of the repetitions."""
        return statistics.median(self.samples_s)

    @property
    def tok_s(self) -> float:
        """Tokens a second."""
        return (self.num_prompt or 1) / self.seconds


class LoadSample(msgspec.Struct, frozen=True, kw_only=True):
    """How long a stand-in in the page cache took until its engine was ready."""

    model: str
    weights_bytes: int
    vocab_size: int
    repacked_bytes: int
    """Weights that the engine rearranged."""
    seconds: float


class OptionRate(msgspec.Struct, frozen=True, kw_only=True):
    """What one combination of load options does on one stand-in: to show what an option does.

    Compare only rates of the same `model`, `depth` and `num_prompt`.  The stand-ins exaggerate what
    they are about (attention, or weights), so that a ratio of two rates is not yet what a model
    gains: for that, compare `planner.calibrated_speed.forecast_calibrated` of each candidate.
    """

    model: str
    setting: LoadSetting
    depth: int
    """Tokens in the sequence when decode was timed."""
    num_prompt: int
    """Tokens of the prompt whose reading was timed."""
    decode_tok_s: float | None = None
    """None where this combination's decode was not timed."""
    prefill_tok_s: float | None = None
    """None where this combination's prefill was not timed."""


class FittedCosts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds for each unit of work under one combination of threads and waiting.

    The units are those of `planner.speed_terms`, where repacked weights and each combination of KV
    types are terms of their own; a term that no stand-in had is absent.
    """

    num_threads: int
    """Of a step with one row, for `decode_s`."""
    num_batch_threads: int
    """Of a step with more rows, for `prefill_s`."""
    wait_policy: str
    decode_s: dict[str, float]
    """Term -> seconds a unit, for one decoded token."""
    prefill_s: dict[str, float]
    """Term -> seconds a unit, for reading a prompt."""
    decode_ratio_low: float
    """5th percentile of measured over fitted seconds, of this fit's own samples."""
    decode_ratio_high: float
    """95th percentile of it."""
    prefill_ratio_low: float
    prefill_ratio_high: float


class LoadCosts(msgspec.Struct, frozen=True, kw_only=True):
    """What getting a model ready takes."""

    fixed_s: float
    """Importing the engine, opening the file, making a context."""
    per_token_of_vocabulary_s: float
    mapped_bytes_per_s: float
    """Mapping and first touch of weights that are in the page cache."""
    repacked_bytes_per_s: float | None
    """Rearranging weights on top; None where the engine does not."""
    disk_bytes_per_s: float | None
    """Reading a file that is not in the page cache; None where the cache could not be emptied."""


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured of one machine with one version of one engine."""

    format_version: int = FORMAT_VERSION
    machine: str
    """The machine's name, as `MachineSpec.name`."""
    ram_bytes: int
    performance_cores: int
    engine: str
    engine_version: str
    measured_unix_s: float
    """When it was finished."""
    duration_s: float
    conditions: Conditions
    """What the machine felt before the first measurement."""
    warnings: tuple[str, ...] = ()
    """Why it would have been refused without `--anyway`; forecasts from it say so."""
    bandwidth: tuple[BandwidthSample, ...]
    base: LoadSetting
    """What `options` vary from; threads as the planner chooses them here."""
    options: tuple[OptionRate, ...]
    """Rates of load options, one option varied at a time."""
    costs: tuple[FittedCosts, ...]
    load: LoadCosts
    samples: tuple[SpeedSample, ...] = ()
    """Everything that `options` and `costs` were made from."""
    load_samples: tuple[LoadSample, ...] = ()

    @property
    def best_bytes_per_s(self) -> float:
        """The highest bandwidth that any number of threads reached."""
        return max(sample.bytes_per_s for sample in self.bandwidth)

    def rates(self, **wanted: object) -> list[OptionRate]:
        """The rates that are at the base in everything but `wanted`, one for each stand-in.

        Args:
            wanted: Fields of `LoadSetting` and the values they must have.

        Example:
            `calibration.rates(repack_weights=True)` beside `calibration.rates()`.
        """
        setting = msgspec.structs.replace(self.base, **wanted)
        return [rate for rate in self.options if rate.setting == setting]
