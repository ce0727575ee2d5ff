"""How people write machines: 'M4 Max:40:128', 'm4-16', 'MacBook Air M4 10-core 16 GB'.

Takes text apart; which chips, bins and sizes exist is known to `chips`.
"""

import difflib
import re
from collections.abc import Iterator, Sequence

import msgspec

from brim.core.machine import Cooling
from brim.errors import ConfigError

PRODUCTS = {
    "macbook air": ("MacBook Air", Cooling.FANLESS),
    "air": ("MacBook Air", Cooling.FANLESS),
    "macbook neo": ("MacBook Neo", Cooling.FANLESS),
    "neo": ("MacBook Neo", Cooling.FANLESS),
    "macbook pro": ("MacBook Pro", Cooling.COMPACT),
    "mbp": ("MacBook Pro", Cooling.COMPACT),
    "mac mini": ("Mac mini", Cooling.COMPACT),
    "mini": ("Mac mini", Cooling.COMPACT),
    "imac": ("iMac", Cooling.COMPACT),
    "mac studio": ("Mac Studio", Cooling.DESKTOP),
    "studio": ("Mac Studio", Cooling.DESKTOP),
    "mac pro": ("Mac Pro", Cooling.DESKTOP),
}
"""Product -> its name and cooling; longer spellings first, so that 'mac mini' is taken whole."""

MAX_NAME_CHARS = 100
"""Twice the longest name that makes sense, and short enough for every number in it."""

_CHIP = re.compile(r"\b(?:apple )?([am])(\d+) ?(pro|max|ultra)?\b")
_PRODUCT = re.compile(r"\b(" + "|".join(PRODUCTS) + r")\b")
_SCREEN = re.compile(r"\b\d\d ?inch\b")
_RAM = re.compile(r"\b(\d+) ?(?:gb|gib|g)(?: (?:ram|unified memory|memory))?\b")
_GPU = re.compile(r"\b(\d+) ?(?:core gpu|gpu cores?|gpu|cores?|c)\b")


class MachineName(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a machine's name; numbers without a unit may mean either."""

    text: str
    chip: str
    gpu_cores: int | None = None
    ram_gb: int | None = None
    numbers: tuple[int, ...] = ()
    """In the order written."""
    is_positional: bool = False
    """Whether colons part it, so that the first number means GPU cores."""
    product: str | None = None
    cooling: Cooling | None = None

    def readings(self) -> Iterator[tuple[int | None, int | None]]:
        """What the name may mean as (GPU cores, GB of memory), the likelier first."""
        if not self.numbers:
            yield self.gpu_cores, self.ram_gb
        elif len(self.numbers) == 2:
            cores, ram = self.numbers
            yield cores, ram
            yield ram, cores
        elif self.gpu_cores is not None:
            yield self.gpu_cores, self.numbers[0]
        elif self.ram_gb is not None:
            yield self.numbers[0], self.ram_gb
        else:
            as_cores, as_ram = (self.numbers[0], None), (None, self.numbers[0])
            yield from (as_cores, as_ram) if self.is_positional else (as_ram, as_cores)


def parse_machine_name(text: str, chips: Sequence[str]) -> MachineName:
    """The parts of a machine's name.

    Args:
        text: What the user wrote.
        chips: Names of the chips that exist.

    Raises:
        ConfigError: It names no chip, one that does not exist, or more than can be read.

    Example:
        >>> name = parse_machine_name("m4-16", ["M4", "M4 Pro"])
        >>> name.chip, list(name.readings())
        ('M4', [(None, 16), (16, None)])
    """
    if len(text) > MAX_NAME_CHARS:
        raise ConfigError(
            f"a machine's name has at most {MAX_NAME_CHARS} characters; write it as in "
            "'M4 Max:40:128'",
            param="machine",
        )
    rest = " ".join(re.sub(r"[-_,;:/()\"']+", " ", text.lower()).split())
    chip, rest = _take_chip(text, _SCREEN.sub(" ", rest), chips)
    product, rest = _take(_PRODUCT, rest)
    ram, rest = _take(_RAM, rest)
    gpu, rest = _take(_GPU, rest)
    words = rest.split()
    unread = [word for word in words if not word.isdecimal()]
    numbers = tuple(int(word) for word in words if word.isdecimal())
    ram_gb, gpu_cores = (None if part is None else int(part) for part in (ram, gpu))
    # '::16' leaves the cores out.
    if re.search(r":\s*:\s*\d+\s*$", text) and len(numbers) == 1:
        ram_gb, numbers = numbers[0], ()
    if unread or len(numbers) + (ram_gb is not None) + (gpu_cores is not None) > 2:
        what = f"'{unread[0]}' is not understood" if unread else "there are too many numbers"
        raise ConfigError(
            f"'{text}' names no machine: {what}; write chip, GPU cores and memory as in "
            f"'M4 Max:40:128', or only '{chip}'",
            param="machine",
        )
    title, cooling = PRODUCTS[product] if product else (None, None)
    return MachineName(
        text=text.strip(),
        chip=chip,
        gpu_cores=gpu_cores,
        ram_gb=ram_gb,
        numbers=numbers,
        is_positional=":" in text,
        product=title,
        cooling=cooling,
    )


def without_vendor(brand: str) -> str:
    """The chip of a brand string.

    Example:
        >>> without_vendor("Apple M4 Max")
        'M4 Max'
    """
    return brand.removeprefix("Apple ").strip()


def _take_chip(text: str, rest: str, chips: Sequence[str]) -> tuple[str, str]:
    found = _CHIP.search(rest)
    if found is None:
        near = difflib.get_close_matches(rest.upper(), chips, n=1, cutoff=0.3)
        raise ConfigError(
            f"'{text}' names no chip; write one as in '{near[0] if near else 'M4 Max'}'; "
            f"known are {', '.join(chips)}",
            param="machine",
        )
    family, number, tier = found.groups()
    chip = f"{family.upper()}{number}" + (f" {tier.title()}" if tier else "")
    if chip not in chips:
        near = sorted(chips, key=lambda known: _distance(known, family.upper(), int(number), tier))
        raise ConfigError(
            f"there is no {chip} in the table; name one that is: the nearest are "
            f"{', '.join(near[:3])}",
            param="machine",
        )
    return chip, f"{rest[: found.start()]} {rest[found.end() :]}"


def _distance(known: str, family: str, number: int, tier: str | None) -> tuple[bool, int]:
    """How far a chip is from what was asked: a generation counts as a tier does."""
    model, _, known_tier = known.partition(" ")
    tiers = ["", "Pro", "Max", "Ultra"]
    steps = abs(tiers.index(known_tier) - tiers.index((tier or "").title()))
    return model[0] != family, abs(int(model[1:]) - number) + steps


def _take(pattern: re.Pattern[str], rest: str) -> tuple[str | None, str]:
    """The first group of the first match, and the text without it."""
    found = pattern.search(rest)
    if found is None:
        return None, rest
    return found[1], f"{rest[: found.start()]} {rest[found.end() :]}"
