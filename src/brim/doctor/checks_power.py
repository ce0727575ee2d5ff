"""Does heat or power hold the machine back?"""

from brim.core.machine import ThermalState
from brim.doctor.facts import Facts
from brim.doctor.finding import Check, Result, note, ok, problem, warning

GROUP = "power"

HOT_CELSIUS = 95.0
"""Where processors throttle whose trip points nobody publishes."""

LOW_BATTERY_PERCENT = 20

COOL = "let it cool: plug it in, free its vents, and pause background work"


def _heat(facts: Facts) -> Result:
    conditions = facts.conditions
    assert conditions is not None
    state, celsius = conditions.thermal, conditions.hottest_celsius
    if state in (ThermalState.TRAPPING, ThermalState.SLEEPING):
        return problem(f"the thermal state is {state.value}", COOL)
    if state is ThermalState.HEAVY or conditions.is_throttled:
        what = "the processors are throttled" if conditions.is_throttled else "thermal state heavy"
        return warning(what, COOL)
    if celsius is not None and celsius >= HOT_CELSIUS:
        return warning(f"the hottest sensor says {celsius:.0f} °C", COOL)
    if state is ThermalState.MODERATE:
        return note("the thermal state is moderate", COOL)
    if state is None and celsius is None:
        return ok("the system does not say how hot it is")
    return ok("nominal" if celsius is None else f"{celsius:.0f} °C")


def _low_power(facts: Facts) -> Result:
    conditions = facts.conditions
    assert conditions is not None
    if conditions.is_low_power is None:
        return ok("the system has no such mode")
    if not conditions.is_low_power:
        return ok("off")
    is_mac = "pmset" in conditions.sources.get("is_low_power", "")
    mend = "sudo pmset -a lowpowermode 0" if is_mac else "powerprofilesctl set balanced"
    return warning("on", mend)


def _battery(facts: Facts) -> Result:
    conditions = facts.conditions
    assert conditions is not None
    percent = conditions.battery_percent
    charge = "" if percent is None else f" at {percent} %"
    if not conditions.is_on_battery:
        return ok("on mains power" if conditions.is_on_battery is False else "no battery")
    if percent is not None and percent <= LOW_BATTERY_PERCENT:
        return warning(f"on battery{charge}", "plug it in")
    return note(f"on battery{charge}", "plug it in")


CHECKS = (
    Check(
        name="heat",
        group=GROUP,
        why="A hot machine runs slower; brim then takes smaller batches, shortens answers and "
        "pauses background work.",
        needs=("conditions",),
        judge=_heat,
    ),
    Check(
        name="low-power",
        group=GROUP,
        why="Low power mode costs up to half of the speed, and brim paces its work in it.",
        needs=("conditions",),
        judge=_low_power,
    ),
    Check(
        name="battery",
        group=GROUP,
        why="On battery brim leaves what nobody waits for until there is power, and saves more "
        "when the charge is low.",
        needs=("conditions",),
        judge=_battery,
    ),
)
