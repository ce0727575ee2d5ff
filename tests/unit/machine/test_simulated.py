"""Scenario files, and the machines that go through them."""

from pathlib import Path

import pytest

from brim.core.machine import Conditions, Pressure, ThermalState
from brim.errors import ConfigError
from brim.machine.process_memory import ProcessMemory
from brim.machine.scenario import Step, load_scenario, parse_scenario
from brim.machine.simulated import SimulatedMachine

EXAMPLES = Path(__file__).parents[3] / "examples" / "scenarios"
HEAD = 'machine = "M4:10:16"\n'
GIB = 1024**3

SCENARIO = """
machine = "MacBook Air M4:10:16"
[[step]]
at_s = 0
others_bytes = 4_000_000_000
pressure = "normal"
is_on_battery = false
[[step]]
at_s = 30
pressure = "critical"
[[step.process]]
name = "browser"
pid = 501
dirty_bytes = 3_000_000_000
resident_bytes = 3_500_000_000
[[step]]
at_s = 60
thermal = "heavy"
is_on_battery = true
process = []
"""


class Clock:
    """Seconds that a test moves on."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_values_hold_until_they_change() -> None:
    """A step changes what it names; the rest stays, and what no step gave is None."""
    clock = Clock()
    machine = SimulatedMachine(parse_scenario(SCENARIO, where="x.toml"), clock)
    seen = []
    for clock.now_s in (0, 29.9, 30, 60, 1e6):
        conditions = machine.read_conditions()
        seen.append((conditions.pressure, conditions.thermal, conditions.is_on_battery))
    normal, critical = Pressure.NORMAL, Pressure.CRITICAL
    assert seen == [
        (normal, None, False),
        (normal, None, False),
        (critical, None, False),
        (critical, ThermalState.HEAVY, True),
        (critical, ThermalState.HEAVY, True),
    ]


def test_signals_are_the_same_readings() -> None:
    """What is asked each second and what is asked now and then are one thing in a simulation."""
    text = SCENARIO + "available_bytes = 2_000_000_000\n"
    machine = SimulatedMachine(parse_scenario(text, where="x.toml"), lambda: 61.0)
    assert machine.read_signals() == machine.read_conditions()
    assert machine.read_signals().available_bytes == 2_000_000_000


def test_processes_take_memory_and_give_it_back() -> None:
    """A scenario's processes count as others, can be asked for by pid, and end."""
    clock = Clock()
    machine = SimulatedMachine(parse_scenario(SCENARIO, where="x.toml"), clock)
    assert machine.read_machine().others_bytes == 4_000_000_000
    assert machine.process_memory(501) is None
    clock.now_s = 30
    assert machine.read_machine().others_bytes == 7_000_000_000
    assert machine.process_memory(501) == ProcessMemory(
        dirty_bytes=3_000_000_000, resident_bytes=3_500_000_000
    )
    assert machine.resident_bytes(501) == 3_500_000_000
    clock.now_s = 60
    assert machine.read_machine().others_bytes == 4_000_000_000
    assert machine.resident_bytes(501) is None


def test_a_simulation_says_that_it_is_one() -> None:
    """Name, flag and every source of every reading say that it is simulated."""
    machine = SimulatedMachine(parse_scenario(SCENARIO, where="x.toml"), lambda: 45.0)
    spec, conditions = machine.read_machine(), machine.read_conditions()
    assert spec.name == "simulated MacBook Air M4:10:16"
    assert spec.is_simulated
    assert conditions.is_simulated
    assert not spec.is_at_hand
    for source in (*spec.sources.values(), *conditions.sources.values()):
        assert source.startswith("simulated: ")
    assert conditions.sources["pressure"] == "simulated: x.toml, step at 30 s"


def test_before_anything_happens_the_machine_is_idle() -> None:
    """Until a step says otherwise others use what an idle desktop does, and nothing is felt."""
    scenario = parse_scenario(HEAD + '[[step]]\nat_s = 5\nthermal = "heavy"\n', where="x.toml")
    machine = SimulatedMachine(scenario, lambda: 4.9)
    assert machine.read_machine().others_bytes == 3_500_000_000
    assert machine.read_conditions().thermal is None


def test_other_processes_are_asked_of_the_machine_behind() -> None:
    """A pid that the scenario does not name is real where a real machine stands behind."""
    inner = SimulatedMachine(parse_scenario(SCENARIO, where="inner.toml"), lambda: 30.0)
    bare = parse_scenario(HEAD + "[[step]]\nat_s = 0\n", where="x.toml")
    assert SimulatedMachine(bare, lambda: 0.0).resident_bytes(501) is None
    assert SimulatedMachine(bare, lambda: 0.0, behind=inner).resident_bytes(501) == 3_500_000_000


def test_memory_of_a_size_that_is_not_sold() -> None:
    """ram_gb gives any chip any memory."""
    text = 'machine = "M4:10"\nram_gb = 20\n[[step]]\nat_s = 0\n'
    assert parse_scenario(text, where="x").machine.ram_bytes == 20 * GIB


def test_requests_are_repeated_until_they_end() -> None:
    """Each stands by itself, in the order of time; the scenario ends with the last."""
    later = ASKED.replace("at_s = 3", "at_s = 4.5")
    text = STEP + MODEL + ASKED + "every_s = 2\nuntil_s = 7.5\n" + later
    scenario = parse_scenario(text, where="x.toml")
    assert [request.at_s for request in scenario.requests] == [3.0, 4.5, 5.0, 7.0]
    assert scenario.end_s == 7.0
    assert scenario.models[0].kv_tokens == 8
    assert parse_scenario("end_s = 50\n" + text, where="x.toml").end_s == 50.0


def test_a_scenario_can_drive_every_reading() -> None:
    """There is a key for each condition, so a new one cannot be forgotten."""
    assert set(Conditions.__struct_fields__) - {"is_simulated", "sources"} == set(
        Step.__struct_fields__
    ) - {"at_s", "others_bytes", "process"}


STEP = HEAD + "[[step]]\nat_s = 0\n"
MODEL = '[[model]]\nname = "chat"\nweights_bytes = 1\nkv_tokens = 8\nkv_token_bytes = 2\n'
ASKED = '[[request]]\nat_s = 3\nmodel = "chat"\nprompt_tokens = 4\nanswer_tokens = 5\n'
PROCESS = STEP + '[[step.process]]\nname = "x"\npid = {pid}\ndirty_bytes = 1\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("machine =", "x.toml is not TOML"),
        ("machine = 1\n", "machine: expected `str`, got `int`"),
        ('machine = "M9"\n[[step]]\nat_s = 0\n', "machine: there is no M9 in the table"),
        ('machine = "M4:10:16"\nram_gb = 20\n[[step]]\nat_s = 0\n', "machine: .*leave one out"),
        ('machine = "M4"\nram_gb = nan\n[[step]]\nat_s = 0\n', "ram_gb: expected `float` >= 1"),
        ('machine = "M4"\nram_gb = inf\n[[step]]\nat_s = 0\n', "ram_gb: expected `float` <= 4096"),
        (STEP + "[[step]]\nat_s = nan\n", "step 2.*at_s"),
        (HEAD, "missing required field `step`"),
        (HEAD + "step = []\n", "step: expected `array` of length >= 1"),
        (HEAD + "stage = 1\n", "there is no key 'stage'; did you mean 'step'"),
        (STEP + 'presure = "normal"\n', "step 1: there is no key 'presure'; did you mean 'pressu"),
        (STEP + 'pressure = "high"\n', "step 1.pressure: .*write normal, warning, critical"),
        (STEP + 'thermal = "hot"\n', "step 1.thermal: .*write nominal, moderate, heavy"),
        (STEP + "busy_fraction = 2\n", "step 1.busy_fraction: expected `float` <= 1.0"),
        (STEP + "others_bytes = -1\n", "step 1.others_bytes: expected `int` >= 0"),
        (STEP + "others_bytes = 99_000_000_000\n", "99000000000, more than the 17179869184"),
        (STEP + "[[step]]\nat_s = 0\n", "step 2: at_s is 0, which is not after"),
        (STEP + "[[step]]\nat_s = -1\n", "step 2.at_s: expected `float` >= 0"),
        (STEP + ASKED, "request 1: there is no \\[\\[model\\]\\] 'chat'"),
        (STEP + MODEL + MODEL, "two models have one name"),
        (STEP + MODEL + ASKED + "every_s = 2\n", "request 1: give every_s and until_s, or neither"),
        (STEP + MODEL + ASKED + "every_s = 0\nuntil_s = 9\n", "request 1.every_s: expected"),
        (
            STEP + MODEL + ASKED + "every_s = 0.001\nuntil_s = 99\n",
            "request 1: until_s .*at most 10000 repeats",
        ),
        (STEP + MODEL + ASKED + "every_s = 5e-324\nuntil_s = 99\n", "request 1: until_s must be"),
        (STEP + MODEL + ASKED + "every_s = 1\nuntil_s = 2\n", "until_s must be at or after at_s"),
        (STEP + MODEL + ASKED + "every_s = 1\nuntil_s = inf\n", "request 1.until_s: expected"),
        ("end_s = inf\n" + STEP, "end_s: expected `float` <= 1000000000"),
        (STEP + "hottest_celsius = nan\n", "step 1.hottest_celsius: expected"),
        (STEP + MODEL + ASKED + 'apps = "x"\n', "there is no key 'apps'; did you mean 'app'"),
        (PROCESS.format(pid=0) + "resident_bytes = 1\n", "step 1.process 1.pid: expected"),
        (
            (PROCESS.format(pid=1) + "resident_bytes = 1\n")
            + (PROCESS.format(pid=1) + "resident_bytes = 1\n").removeprefix(STEP),
            "step 1: two processes have one pid",
        ),
        (
            PROCESS.format(pid=1) + "resident = 1\n",
            "process 1: there is no key 'resident'; did you",
        ),
    ],
)
def test_wrong_scenarios_name_the_key(text: str, words: str) -> None:
    """A key or value that is wrong is one sentence with the file, the step and the key."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse_scenario(text, where="x.toml")
    assert caught.value.message.startswith("x.toml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A scenario that is missing or no text says so."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_scenario(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_scenario(binary)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_can_be_played(path: Path) -> None:
    """Every scenario that is shown loads, and each of its steps can be read."""
    scenario = load_scenario(path)
    clock = Clock()
    machine = SimulatedMachine(scenario, clock)
    for step in scenario.steps:
        clock.now_s = step.at_s
        assert machine.read_machine().others_bytes > 0
        assert machine.read_conditions().is_simulated


def test_there_are_examples() -> None:
    """The directory of examples is found from here."""
    assert len(list(EXAMPLES.glob("*.toml"))) >= 3
