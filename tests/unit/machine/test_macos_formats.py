"""What macOS's calls and commands give, from recorded outputs and from the headers' layouts."""

import ctypes
import re
from pathlib import Path

import pytest

from brim.core.machine import Cooling
from brim.machine.macos_formats import (
    VM_STATISTICS,
    VM_STATISTICS_INTS,
    Battery,
    VmCounters,
    cooling_of,
    parse_gpu_cores,
    parse_low_power_mode,
    parse_pmset_batt,
    parse_product,
    parse_rusage,
    parse_swap_usage,
    parse_sysctl_int,
    parse_vm_stat,
    parse_vm_statistics,
)

FIXTURES = Path(__file__).parent / "fixtures"
VM_STAT = (FIXTURES / "vm_stat_m5pro_48g_macos26.txt").read_text()
U32, U64 = ctypes.c_uint32, ctypes.c_uint64


class VmStatistics64(ctypes.Structure):
    """The header's own declaration (osfmk/mach/vm_statistics.h), as far as macOS 15 has it."""

    _fields_ = (
        *((name, U32) for name in ("free", "active", "inactive", "wire")),
        *((name, U64) for name in ("zero_fill", "reactivations", "pageins", "pageouts")),
        *((name, U64) for name in ("faults", "cow_faults", "lookups", "hits", "purges")),
        *((name, U32) for name in ("purgeable", "speculative")),
        *((name, U64) for name in ("decompressions", "compressions", "swapins", "swapouts")),
        *((name, U32) for name in ("compressor", "throttled", "external", "internal")),
        ("total_uncompressed", U64),
    )


class RusageInfoV4(ctypes.Structure):
    """The head of the header's declaration (bsd/sys/resource.h)."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        *((name, U64) for name in ("user_time", "system_time", "idle_wkups", "interrupt_wkups")),
        *((name, U64) for name in ("pageins", "wired_size", "resident_size", "phys_footprint")),
    )


def recorded_counters() -> VmStatistics64:
    """The recorded vm_stat in the kernel's binary form."""
    line = {name: int(n) for name, n in re.findall(r'^"?([^":\n]+)"?:\s+(\d+)\.$', VM_STAT, re.M)}
    return VmStatistics64(
        free=line["Pages free"] + line["Pages speculative"],
        active=line["Pages active"],
        inactive=line["Pages inactive"],
        wire=line["Pages wired down"],
        purgeable=line["Pages purgeable"],
        speculative=line["Pages speculative"],
        swapins=line["Swapins"],
        swapouts=line["Swapouts"],
        compressor=line["Pages occupied by compressor"],
        external=line["File-backed pages"],
        internal=line["Anonymous pages"],
    )


def test_layouts_are_as_large_as_the_headers() -> None:
    """vm_statistics64 is 152 bytes or 38 ints, and the footprint lies at byte 72 of the rusage."""
    assert ctypes.sizeof(VmStatistics64) == VM_STATISTICS.size == 152
    assert VM_STATISTICS_INTS == 38
    assert RusageInfoV4.phys_footprint.offset == 72


@pytest.mark.parametrize("num_ints", [38, 40, 62, 104, 256])
def test_kernel_and_command_say_the_same(num_ints: int) -> None:
    """The binary counters of any release are read as the printed ones are."""
    data = bytes(recorded_counters()) + bytes(4 * (num_ints - 38))
    counters = parse_vm_statistics(data, 16384)
    assert counters is not None
    assert counters._replace(source="vm_stat") == parse_vm_stat(VM_STAT)


def test_short_counters_are_no_answer() -> None:
    """A struct that is cut, or pages of an unknown size, give None."""
    data = bytes(recorded_counters())
    assert parse_vm_statistics(data[:-1], 16384) is None
    assert parse_vm_statistics(data, 0) is None


def test_used_memory_is_app_wired_and_compressed() -> None:
    """Used memory is anonymous less purgeable, wired and compressed pages: 37.6 of 48 GiB here."""
    pages = 1946873 - 14563 + 291583 + 244173
    assert parse_vm_stat(VM_STAT).used_bytes() == pages * 16384


def test_recorded_pressure_is_low() -> None:
    """The compressor's share of the recorded machine is 0.096, far below the warning at 1."""
    assert parse_vm_stat(VM_STAT).compressor_ratio() == pytest.approx(0.0959, abs=0.0001)


def test_a_machine_without_pages_has_no_ratio() -> None:
    """Where nothing is pageable there is no ratio, and no division by zero."""
    assert VmCounters(16384, 0, 0, 0, 9, 0, 0, 5, 0, 0, "x").compressor_ratio() is None


@pytest.mark.parametrize("lost", ["Anonymous pages", "Pages wired down", "page size of"])
def test_broken_vm_stat_is_refused(lost: str) -> None:
    """Without one of its counters nobody knows what is free, and nothing may be promised."""
    broken = "".join(line for line in VM_STAT.splitlines(True) if lost not in line)
    with pytest.raises(KeyError, match=r"(?i)page"):
        parse_vm_stat(broken)


def test_footprint_is_what_the_system_charges() -> None:
    """A process's dirty bytes are its phys_footprint, of the recorded layout here."""
    text = (FIXTURES / "footprint.txt").read_text()
    footprint = int(re.findall(r"phys_footprint: (\d+) B", text)[0])
    head = bytes(RusageInfoV4(phys_footprint=footprint, resident_size=77, wired_size=5))
    memory = parse_rusage(head + bytes(512 - len(head)))
    assert (memory.dirty_bytes, memory.resident_bytes) == (211812352, 77)


def test_recorded_swap_usage() -> None:
    """xsw_usage has total, available and used bytes in this order."""
    text = (FIXTURES / "swapusage.txt").read_text()
    total, used, free = (round(float(n) * 2**20) for n in re.findall(r"= ([\d.]+)M", text))
    data = b"".join(n.to_bytes(8, "little") for n in (total, free, used)) + bytes(8)
    assert parse_swap_usage(data) == used == round(494.44 * 2**20)
    assert parse_swap_usage(data[:20]) is None


@pytest.mark.parametrize(
    ("data", "value"),
    [(b"\xff\xff\xff\xff", -1), (b"\xff" * 8, 2**64 - 1), (b"\x00" * 3, None), (None, None)],
)
def test_sysctl_numbers(data: bytes | None, value: int | None) -> None:
    """Four bytes are signed, eight are not, and any other length is no number."""
    assert parse_sysctl_int(data) == value


def test_recorded_gpu_cores() -> None:
    """The recorded ioreg of an M4 names ten GPU cores; one that names none gives None."""
    assert parse_gpu_cores((FIXTURES / "ioreg_m4.txt").read_text()) == 10
    assert parse_gpu_cores((FIXTURES / "ioreg_m4_raw_client.txt").read_text()) is None


@pytest.mark.parametrize(
    ("text", "battery"),
    [
        ((FIXTURES / "pmset_batt_ac.txt").read_text(), Battery(False, 100)),
        (
            "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t89%; discharging; "
            "6:02 remaining present: true",
            Battery(True, 89),
        ),
        ("Now drawing from 'AC Power'\n", Battery(False, None)),
        ("Now drawing from 'UPS Power'\n -UPS-1\t50%; discharging", Battery(True, None)),
        ("", None),
    ],
)
def test_pmset_batt(text: str, battery: Battery | None) -> None:
    """Laptops, desktops and those on a UPS are told apart, and silence is None."""
    assert parse_pmset_batt(text) == battery


@pytest.mark.parametrize(
    ("text", "is_low"),
    [
        (" lowpowermode         0\n", False),
        (" sleep  1\n lowpowermode         1\n", True),
        (" powermode            1\n", True),
        (" sleep                1\n", None),
    ],
)
def test_low_power_mode(text: str, is_low: bool | None) -> None:
    """Low Power Mode is 1 under either name, and a Mac that prints neither says nothing."""
    assert parse_low_power_mode(text) is is_low


@pytest.mark.parametrize(
    ("text", "product", "cooling"),
    [
        ('{"SPHardwareDataType":[{"machine_name":"MacBook Air"}]}', "MacBook Air", "fanless"),
        ('{"SPHardwareDataType":[{"machine_name":"Mac Studio"}]}', "Mac Studio", "desktop"),
        ('{"SPHardwareDataType":[{"machine_name":"Mac Cube"}]}', "Mac Cube", None),
        ('{"SPHardwareDataType":[]}', None, None),
        ("[]", None, None),
        ("", None, None),
    ],
)
def test_product(text: str, product: str | None, cooling: str | None) -> None:
    """The product's name gives its cooling; one that is not known gives none."""
    assert parse_product(text) == product
    assert cooling_of(product) == (None if cooling is None else Cooling(cooling))
