"""What was gathered about the machine, before anybody judges it; bytes are int, None is unread."""

import msgspec

from brim.core.event import Event
from brim.core.machine import Conditions, MachineSpec
from brim.core.model import ModelSpec
from brim.core.plan import Plan
from brim.prefix_cache.inspect import DirectoryStats


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """All processes of one program."""

    name: str
    num_processes: int
    dirty_bytes: int
    """Anonymous memory, swapped or not: what would be free if it ended."""
    resident_bytes: int
    """In RAM, mapped files such as weights included."""


class OtherServer(msgspec.Struct, frozen=True, kw_only=True):
    """An inference server that is not brim's."""

    name: str
    pid: int | None
    """None where only its port answers."""
    held_bytes: int
    stop: str
    """What ends it."""


class Processes(msgspec.Struct, frozen=True, kw_only=True):
    """What else runs here."""

    programs: tuple[Program, ...] = ()
    """Largest first; brim's own are left out."""
    own_bytes: int = 0
    """Dirty memory of brim's processes."""
    other_servers: tuple[OtherServer, ...] = ()
    indexers: tuple[str, ...] = ()
    """Programs that read every new file to search it, and work now."""


class GpuLimit(msgspec.Struct, frozen=True, kw_only=True):
    """What the GPU may keep resident, and whether somebody has changed it."""

    wired_limit_bytes: int | None = None
    """`iogpu.wired_limit_mb`; None where it is not set or there is none."""


class Rereads(msgspec.Struct, frozen=True, kw_only=True):
    """Files that memory had dropped and that were read again, while somebody watched."""

    bytes_per_s: float | None = None
    """None where the system does not count them."""


class Folder(msgspec.Struct, frozen=True, kw_only=True):
    """A directory that models lie in."""

    path: str
    file_system: str
    """Its type, as the mount table has it."""
    is_indexed: bool | None = None
    """Whether the system's search reads it; None where that is not known."""
    is_rotational: bool | None = None
    read_bytes_per_s: float | None = None
    """Measured past the page cache; None where no file is large enough or the system cannot."""


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model on this machine."""

    reference: str
    spec: ModelSpec


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of a running server, and how it is used."""

    plan: Plan
    num_answers: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    is_quarantined: bool = False
    reason: str = ""
    num_deaths: int = 0


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's backend as it was built."""

    engine: str
    version: str = ""
    has_gpu: bool = False
    features: tuple[str, ...] = ()
    """Instruction sets it was compiled for, as it names them; empty where it does not say."""
    problem: str = ""
    """Why it does not start."""


class Builds(msgspec.Struct, frozen=True, kw_only=True):
    """Engines here, and what the processor could do."""

    builds: tuple[Build, ...]
    system: str
    """'linux' or 'darwin'."""
    architecture: str
    """'arm64', 'aarch64' or 'x86_64'."""
    cpu_features: tuple[str, ...] = ()
    """As the system names them."""
    has_gpu: bool = False
    """Whether a GPU that an engine could use is there."""
    is_translated: bool = False
    """Whether Python was built for Intel and runs through Rosetta."""


class Permission(msgspec.Struct, frozen=True, kw_only=True):
    """A file or directory of ours, and who may do what with it."""

    path: str
    is_directory: bool
    mode: int
    is_own: bool
    is_writable: bool
    is_secret: bool
    """Whether others must not even read it."""
    is_shielded: bool = False
    """Whether it lies in a directory of ours that others cannot enter."""


class Crashes(msgspec.Struct, frozen=True, kw_only=True):
    """What went down lately."""

    worker_events: tuple[Event, ...] = ()
    """Deaths, quarantines and unloads that failed, oldest first."""
    panics: tuple[str, ...] = ()
    """Reports of kernel panics that name the GPU's memory, newest first."""
    other_panics: tuple[str, ...] = ()
    num_oom_kills: int | None = None
    """In our control group since it was made; None where nobody counts."""
    oom_victims: tuple[str, ...] = ()
    """What the kernel's log says of them."""


class StaleState(msgspec.Struct, frozen=True, kw_only=True):
    """What earlier servers left behind."""

    files: tuple[str, ...] = ()
    """Of servers and workers that run no more, and of writes that were cut off."""
    orphans: tuple[int, ...] = ()
    """Workers that outlived their gateway."""
    damaged: tuple[str, ...] = ()
    """Files that were put aside."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    machine: MachineSpec | None = None
    conditions: Conditions | None = None
    rereads: Rereads | None = None
    processes: Processes | None = None
    gpu: GpuLimit | None = None
    folders: tuple[Folder, ...] | None = None
    local_models: tuple[LocalModel, ...] | None = None
    served: tuple[ServedModel, ...] | None = None
    llamacpp: Builds | None = None
    mlx: Builds | None = None
    cache: DirectoryStats | None = None
    permissions: tuple[Permission, ...] | None = None
    crashes: Crashes | None = None
    stale: StaleState | None = None
    unread: dict[str, str] = {}
    """Field -> why it is None."""
