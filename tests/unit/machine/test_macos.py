"""What macOS says, from recorded outputs; the calls themselves need a Mac."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from brim.errors import ConfigError
from brim.machine.macos import (
    Sysctl,
    gpu_limit_bytes,
    parse_vm_stat,
    performance_cores,
    process_memory,
    read_macos,
    sysctl_bytes,
    used_bytes,
)

FIXTURES = Path(__file__).parent / "fixtures"
VM_STAT = (FIXTURES / "vm_stat_m5pro_48g_macos26.txt").read_text()


def recorded_sysctl(text: str) -> Sysctl:
    """A sysctl that answers from the output of the command, in the kernel's binary form."""
    values: dict[str, bytes] = {}
    for name, value in re.findall(r"^(\S+): (.+)$", text, re.M):
        is_number = value.isdigit()
        values[name] = int(value).to_bytes(4, "little") if is_number else value.encode() + b"\0"
    return values.get


def test_recorded_vm_stat_has_all_counters() -> None:
    """Every line of a recorded vm_stat is read, the quoted one and the page size included."""
    values = parse_vm_stat(VM_STAT)
    assert len(values) == 34
    assert values["page size"] == 16384
    assert values["Translation faults"] == 15158843396
    assert values["Anonymous pages"] == 1946873


def test_used_memory_is_app_wired_and_compressed() -> None:
    """Used memory is anonymous less purgeable, wired and compressed pages: 37.6 of 48 GiB here."""
    pages = 1946873 - 14563 + 291583 + 244173
    assert used_bytes(parse_vm_stat(VM_STAT)) == pages * 16384


@pytest.mark.parametrize("lost", ["Anonymous pages", "Pages wired down", "page size of"])
def test_broken_vm_stat_is_refused(lost: str) -> None:
    """Without one of its counters nobody knows what is free, and nothing may be promised."""
    broken = "".join(line for line in VM_STAT.splitlines(True) if lost not in line)
    with pytest.raises(ConfigError, match=r"vm_stat does not say .*run it by hand"):
        used_bytes(parse_vm_stat(broken))


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no such file"), subprocess.TimeoutExpired("vm_stat", 5)]
)
def test_vm_stat_that_does_not_answer_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A missing or hanging command names itself and says what to do."""

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ConfigError, match=r"vm_stat cannot be asked .*run it by hand"):
        read_macos()


@pytest.mark.parametrize(("file", "cores"), [("sysctl_m6.txt", 6), ("sysctl_m3max.txt", 12)])
def test_efficiency_level_is_left_out(file: str, cores: int) -> None:
    """The slowest level is left out by its index, with two levels as with three."""
    assert performance_cores(recorded_sysctl((FIXTURES / file).read_text()))[0] == cores


def test_two_fast_levels_both_count() -> None:
    """Where the last level is not an efficiency one, all levels count."""
    text = (
        "hw.nperflevels: 2\nhw.perflevel0.name: Super\nhw.perflevel0.physicalcpu: 6\n"
        "hw.perflevel1.name: Performance\nhw.perflevel1.physicalcpu: 12\n"
    )
    assert performance_cores(recorded_sysctl(text))[0] == 18


def test_without_levels_all_cores_count() -> None:
    """A system without performance levels gives its physical cores, and one at the least."""
    assert performance_cores(recorded_sysctl("hw.physicalcpu: 8"))[0] == 8
    assert performance_cores(recorded_sysctl(""))[0] == 1


def test_gpu_limit_is_asked_and_never_computed() -> None:
    """Metal's figure comes first, then the operator's override, and without both it is unknown."""
    override = recorded_sysctl("iogpu.wired_limit_mb: 26000")
    assert gpu_limit_bytes(override, lambda: 5726633984)[0] == 5726633984
    assert gpu_limit_bytes(override, lambda: None)[0] == 26000 * 1024**2
    limit, source = gpu_limit_bytes(recorded_sysctl("iogpu.wired_limit_mb: 0"), lambda: None)
    assert limit is None
    assert "not set" in source


@pytest.mark.skipif(platform.system() == "Darwin", reason="a Mac has these libraries")
def test_elsewhere_the_calls_give_none() -> None:
    """Off a Mac the libraries are missing, which gives None and no exception."""
    assert sysctl_bytes("hw.memsize") is None
    assert process_memory(1) is None
