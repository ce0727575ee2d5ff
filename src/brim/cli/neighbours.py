"""Other brim servers of this machine: what they say of their models, and what they were granted.

Each server keeps its own account.  The weights that one has mapped look like free memory to
everybody else, so a process that is about to load a model asks the others what they have planned.
Two that start in the same moment still do not see each other.
"""

import http.client
import os
import urllib.parse

import msgspec

from brim.cli.state import ServerState, running_servers
from brim.core.machine import MachineSpec
from brim.errors import BrimError
from brim.machine.process import process_memory
from brim.machine.reading import read_machine
from brim.runtime.api import ModelStatus

NEIGHBOUR_LIMIT_S = 1.0
"""A neighbour that says nothing for so long is left out rather than waited for."""


def machine_beside_servers() -> MachineSpec:
    """A fresh reading in which what other servers were granted counts as used.

    What their workers hold in anonymous memory is in the reading already; the rest of each plan,
    mapped weights and KV that was not touched yet, is added.
    """
    machine = read_machine()
    others = [server for server in running_servers() if server.pid != os.getpid()]
    promised_bytes = sum(_promised_bytes(server) for server in others)
    if not promised_bytes:
        return machine
    measured = machine.sources.get("others_bytes", "measured")
    sources = {**machine.sources, "others_bytes": f"{measured}; and plans of other brim servers"}
    return msgspec.structs.replace(
        machine, others_bytes=machine.others_bytes + promised_bytes, sources=sources
    )


def _promised_bytes(server: ServerState) -> int:
    """Granted bytes of a server's models that do not show in the machine's reading yet."""
    try:
        statuses = statuses_of(server, within_s=NEIGHBOUR_LIMIT_S)
    except BrimError:
        return 0
    promised_bytes = 0
    for status in statuses:
        held = None if status.pid is None else process_memory(status.pid)
        dirty_bytes = 0 if held is None else held.dirty_bytes
        promised_bytes += max(0, status.plan.memory.total_bytes - dirty_bytes)
    return promised_bytes


def statuses_of(server: ServerState, *, within_s: float) -> list[ModelStatus]:
    """What a server says of its models.

    Raises:
        BrimError: It does not answer, or not as a server of this version does.
    """
    # Not urllib's opener, which would send a request to this machine through a proxy.
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=within_s)
    try:
        connection.request("GET", "/brim/ps")
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise BrimError(f"the server on {server.url} answers {response.status}; restart it")
        return msgspec.json.decode(body, type=list[ModelStatus])
    except (OSError, http.client.HTTPException, msgspec.DecodeError) as exc:
        raise BrimError(
            f"the server on {server.url} (pid {server.pid}) gives no answer ({exc}); "
            "try again, or stop it with: brim stop"
        ) from exc
    finally:
        connection.close()
