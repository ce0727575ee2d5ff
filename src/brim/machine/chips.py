"""Apple's chips as its maker sells them: the table, and machines described from it.

Owns `data/chips.json` and what follows from it for a machine that is not at hand, or for what a
Mac at hand does not say of itself.  The spelling of machines is read in `names`.
"""

import functools
import importlib.resources
from collections.abc import Iterator, Sequence

import msgspec

from brim.core.machine import Cooling, MachineSpec
from brim.errors import ConfigError
from brim.machine.names import MachineName, parse_machine_name, without_vendor

GIB = 1024**3
GIGA = 10**9


_COOLER_PRODUCTS = {"": "Mac mini", "Max": "Mac Studio"}
"""Tier -> a product that cools it better than the weakest; Pro and Ultra know one kind alone."""


class Chip(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One bin of a chip; a bin whose bandwidth differs by memory is two."""

    chip: str
    cpu_cores: tuple[int, ...]
    """Of each performance level, fastest first."""
    slowest_cores: str
    """'efficiency' or 'performance': what the last level is."""
    gpu_cores: int
    ram_gb: tuple[int, ...]
    """Sizes sold, in GB of hw.memsize, which are GiB."""
    memory_bandwidth_gb_s: float
    """In 1e9 bytes a second."""
    fp32_tflops: float | None
    cooling: Cooling | None
    """The weakest of the products it is sold in; None where that is not known."""
    note: str | None


class _IdleOthers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    up_to_16: float
    above: float


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    provenance: dict[str, str]
    working_set_fraction: dict[int, float]
    idle_others_gb: _IdleOthers
    chips: tuple[Chip, ...]


@functools.cache
def _table() -> _Table:
    path = importlib.resources.files("brim.machine") / "data" / "chips.json"
    return msgspec.json.decode(path.read_bytes(), type=_Table, strict=False)


def chips() -> tuple[Chip, ...]:
    """Every bin of the table: oldest chip first, of a chip the lower bin first."""
    return _table().chips


def find_chip(brand: str, gpu_cores: int | None, ram_bytes: int) -> Chip | None:
    """The bin of a Mac at hand; the lower one where its GPU cores are not known.

    Args:
        brand: As sysctl gives it: 'Apple M4 Max'.
        gpu_cores: None where the system does not say.
        ram_bytes: hw.memsize; a size that is not sold rules nothing out.

    Example:
        >>> find_chip("Apple M4 Max", None, 128 * 2**30).gpu_cores
        40
        >>> find_chip("Apple M1 (Virtual)", 8, 2**34) is None
        True
    """
    bins = _named(chips(), without_vendor(brand))
    if gpu_cores is not None:
        bins = [chip for chip in bins if chip.gpu_cores == gpu_cores]
    sold = [chip for chip in bins if ram_bytes / GIB in chip.ram_gb]
    return next(iter(sold or bins), None)


def named_machine(text: str) -> MachineSpec:
    """The machine that `text` names, idle, as macOS 26 would run it.

    Args:
        text: Chip, GPU cores and memory in any usual writing: 'M4 Max:40:128', 'm4-16', 'M4 Max',
            'MacBook Air M4 10-core 16 GB'.  Without cores the lower bin is taken that is sold
            with the memory, without memory the smallest size that is sold with the cores.

    A size that is sold with other chips alone is planned for all the same, and its source says so.

    Raises:
        ConfigError: There is no such chip or bin, or no Mac has that much memory.

    Example:
        >>> named_machine("m4-16").ram_bytes == 16 * 2**30
        True
        >>> named_machine("M4 Max 128GB").name
        'M4 Max:40:128'
    """
    name = _parse(text)
    chip, gpu_cores, ram_gb = _choose(name, _named(chips(), name.chip))
    spec = machine_of(chip, ram_gb or chip.ram_gb[0], cooling=name.cooling)
    if ram_gb is not None and ram_gb not in chip.ram_gb:
        unsold = {"ram_bytes": f"named, though no {spec.name} is sold"}
        spec = msgspec.structs.replace(spec, sources=spec.sources | unsold)
    return _with_origins(spec, name, gpu_cores is not None, ram_gb is not None)


def machine_with_ram(text: str, ram_gb: float) -> MachineSpec:
    """The machine that `text` names, with memory of a size that need not be sold.

    Args:
        text: Chip and, where it has bins, GPU cores.
        ram_gb: Memory in GiB.

    Raises:
        ConfigError: There is no such chip or bin, or `text` says a memory size as well.
    """
    name = _parse(text)
    if name.ram_gb is not None or len(name.numbers) > 1:
        raise ConfigError(
            f"'{name.text}' names a memory size beside the {ram_gb:g} GB; leave one out",
            param="machine",
        )
    gpu_cores = name.gpu_cores or next(iter(name.numbers), None)
    chip = find_chip(name.chip, gpu_cores, round(ram_gb * GIB))
    if chip is None:
        raise _not_sold(name, _named(chips(), name.chip))
    spec = machine_of(chip, ram_gb, cooling=name.cooling)
    return _with_origins(spec, name, gpu_cores is not None, True)


def known_machines() -> Iterator[MachineSpec]:
    """Every bin with every memory size it is sold with, as `named_machine` gives them."""
    for chip in chips():
        for ram_gb in chip.ram_gb:
            yield machine_of(chip, ram_gb)


def machine_of(chip: Chip, ram_gb: float, *, cooling: Cooling | None = None) -> MachineSpec:
    """An idle machine with this chip and any memory, sold or not.

    Args:
        chip: A bin of the table.
        ram_gb: Memory in GiB.
        cooling: That of the product; by the chip unless given.
    """
    others = _table().idle_others_gb
    others_gb = others.up_to_16 if ram_gb <= 16 else others.above
    fraction, fraction_source = working_set_fraction(ram_gb)
    flops, flops_source = fp32_flops(chip)
    ram_bytes = round(ram_gb * GIB)
    return MachineSpec(
        name=f"{chip.chip}:{chip.gpu_cores}:{ram_gb:g}",
        system="darwin",
        ram_bytes=ram_bytes,
        others_bytes=round(others_gb * GIGA),
        gpu_limit_bytes=round(ram_bytes * fraction),
        performance_cores=_performance_cores(chip),
        chip=chip.chip,
        gpu_cores=chip.gpu_cores,
        memory_bandwidth=round(chip.memory_bandwidth_gb_s * GIGA),
        fp32_flops=flops,
        cooling=cooling or chip.cooling,
        is_at_hand=False,
        sources={
            "ram_bytes": "named",
            "others_bytes": f"assumed: an idle macOS desktop, {others_gb} GB at this memory size",
            "gpu_limit_bytes": fraction_source,
            "performance_cores": "chip table",
            "chip": "chip table" + (f": {chip.note}" if chip.note else ""),
            "gpu_cores": "chip table",
            "memory_bandwidth": "chip table: what Apple states",
            "fp32_flops": flops_source,
            "cooling": _cooling_source(chip),
        },
    )


def working_set_fraction(ram_gb: float) -> tuple[float, str]:
    """What macOS 26 lets the GPU keep resident, as a share of RAM, and where that comes from.

    Between recorded sizes it is interpolated, beyond them the nearest one holds.

    Example:
        >>> working_set_fraction(96)[0]
        0.825
    """
    known = _table().working_set_fraction
    if ram_gb in known:
        return known[int(ram_gb)], f"{known[int(ram_gb)]:g} x RAM, as recorded on macOS 26"
    if not min(known) < ram_gb < max(known):
        nearest = min(known) if ram_gb < min(known) else max(known)
        return known[nearest], f"{known[nearest]:g} x RAM, as on macOS 26 with {nearest} GB"
    below = max(size for size in known if size < ram_gb)
    above = min(size for size in known if size > ram_gb)
    share = (ram_gb - below) / (above - below)
    fraction = round(known[below] + share * (known[above] - known[below]), 4)
    return fraction, f"{fraction:g} x RAM, interpolated between {below} and {above} GB (macOS 26)"


def fp32_flops(chip: Chip) -> tuple[int | None, str]:
    """The GPU's rate, and its source: stated, or by the rate of one core elsewhere.

    The bins of one chip share a clock, and so do the chips of a generation as far as stated.
    """
    if chip.fp32_tflops is not None:
        return round(chip.fp32_tflops * GIGA * 1000), "chip table: what Apple states"
    generation = chip.chip.partition(" ")[0]
    stated = [other for other in chips() if other.fp32_tflops is not None]
    same_chip = _named(stated, chip.chip)
    same_generation = [other for other in stated if other.chip.split(" ")[0] == generation]
    for other in (*same_chip, *same_generation):
        rate = (other.fp32_tflops or 0.0) / other.gpu_cores
        return (
            round(rate * chip.gpu_cores * GIGA * 1000),
            f"by its cores from the {other.gpu_cores}-core {other.chip}",
        )
    return None, "nobody states it"


def _choose(name: MachineName, bins: Sequence[Chip]) -> tuple[Chip, int | None, int | None]:
    """The bin that a name means, and the GPU cores and GB of memory that it says.

    Raises:
        ConfigError: No bin of the chip has what was asked for.
    """
    for gpu_cores, ram_gb in name.readings():
        fitting = [
            chip
            for chip in bins
            if gpu_cores in (None, chip.gpu_cores) and (ram_gb is None or ram_gb in chip.ram_gb)
        ]
        if fitting:
            return fitting[0], gpu_cores, ram_gb
    # A size that Apple sells with other chips is a fair question, and `machine_of` can answer it.
    for gpu_cores, ram_gb in name.readings():
        fitting = [chip for chip in bins if gpu_cores in (None, chip.gpu_cores)]
        if fitting and ram_gb in _sold_sizes():
            return fitting[0], gpu_cores, ram_gb
    raise _not_sold(name, bins)


@functools.cache
def _sold_sizes() -> frozenset[float]:
    return frozenset(size for chip in chips() for size in chip.ram_gb)


def _not_sold(name: MachineName, bins: Sequence[Chip]) -> ConfigError:
    gpu_cores, ram_gb = next(name.readings())
    near = min(bins, key=lambda chip: abs(chip.gpu_cores - (gpu_cores or 0)))
    near_ram_gb = min(near.ram_gb, key=lambda size: abs(size - (ram_gb or 0)))
    sold = "; ".join(
        f"{cores} GPU cores with {', '.join(map(str, sizes))} GB"
        for cores, sizes in _sizes_by_cores(bins).items()
    )
    return ConfigError(
        f"no {name.chip} is sold as '{name.text}'; it comes with {sold}: "
        f"write '{near.chip}:{near.gpu_cores}:{near_ram_gb}'",
        param="machine",
    )


def _sizes_by_cores(bins: Sequence[Chip]) -> dict[int, list[int]]:
    sizes: dict[int, list[int]] = {}
    for chip in bins:
        sizes.setdefault(chip.gpu_cores, []).extend(chip.ram_gb)
    return sizes


def _performance_cores(chip: Chip) -> int:
    levels = chip.cpu_cores[:-1] if chip.slowest_cores == "efficiency" else chip.cpu_cores
    return sum(levels)


def _cooling_source(chip: Chip) -> str:
    if chip.cooling is None:
        return "not known in which products it is sold; name one: 'MacBook Pro'"
    example = _COOLER_PRODUCTS.get(chip.chip.partition(" ")[2])
    if example is None:
        return "chip table: the same in all that it is sold in"
    return f"assumed: the weakest it is sold with; name the product, as in '{example} {chip.chip}'"


def _named(bins: Sequence[Chip], name: str) -> list[Chip]:
    return [chip for chip in bins if chip.chip == name]


def _parse(text: str) -> MachineName:
    return parse_machine_name(text, tuple(dict.fromkeys(chip.chip for chip in chips())))


def _with_origins(
    spec: MachineSpec, name: MachineName, says_gpu_cores: bool, says_ram: bool
) -> MachineSpec:
    """With the product in its name, and what was assumed in its sources."""
    sources = dict(spec.sources)
    example = f"name one, as in '{spec.name}'"
    if not says_ram:
        sources["ram_bytes"] = f"assumed: the smallest size sold; {example}"
    if not says_gpu_cores:
        sources["gpu_cores"] = f"assumed: the lower bin sold; {example}"
    if name.cooling is not None:
        sources["cooling"] = f"the product: {name.product}"
    full = f"{name.product} {spec.name}" if name.product else spec.name
    return msgspec.structs.replace(spec, name=full, sources=sources)
