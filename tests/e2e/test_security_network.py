"""Nothing leaves the machine: a whole session, watched by the kernel and without any network."""

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require_engine
from support.server_process import ServerProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="strace and unshare are Linux's")

_CALL = re.compile(r"\b(connect|sendto|sendmsg|bind)\(\d+, (?P<rest>.*)")
_ADDRESS = re.compile(r"sa_family=(?P<family>\w+)(?:, (?P<address>[^}]*))?")
_HERE = ('inet_addr("127.', 'inet_pton(AF_INET6, "::1"')


def strangers(trace: str) -> list[str]:
    """Lines of a trace in which anything but this machine is spoken to or listened on.

    Unix sockets, and the kernel's own (netlink), never leave it; a name service is one that could.
    """
    found = []
    for line in trace.splitlines():
        call = _CALL.search(line)
        address = _ADDRESS.search(call["rest"]) if call is not None else None
        if address is None or address["family"] in ("AF_NETLINK", "AF_UNSPEC"):
            continue
        where = address["address"] or ""
        is_here = any(each in where for each in _HERE)
        if address["family"] == "AF_UNIX":
            is_here = "nscd" not in where and "resolve" not in where
        if not is_here:
            found.append(line)
    return found


def session(server: ServerProcess) -> None:
    """What people do with a server: chat, stream, repeat, look at it."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "Return the sum of the items of a list. " * 8}],
        "max_tokens": 8,
    }
    for _ in range(2):
        assert server.ask("POST", "/v1/chat/completions", body)[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True}))
    assert b"[DONE]" in connection.getresponse().read()
    for path in ("/metrics", "/openapi.json", "/brim/ps", "/brim/events?follow=false", "/health"):
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200, path
        response.read()
    connection.close()
    for command in (("ps",), ("events",), ("cache", "list")):
        done = server.brim(*command, "--json")
        assert done.returncode == 0, done.stderr


def test_a_session_speaks_to_this_machine_alone(tmp_path: Path) -> None:
    """The kernel saw no connection and no datagram of gateway or worker to any other address."""
    require_engine("llamacpp")
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    calls = "trace=connect,sendto,sendmsg,bind,clone,clone3,vfork,execve"
    # -D keeps the server, not strace, the process that is started and stopped here.
    starter = (strace, "-D", "-f", "-qq", "-s", "200", "-e", calls, "-o", str(trace))
    settings = {"cache.min_tokens": 8, "cache.free_disk_floor_bytes": 0}
    with ServerProcess(tmp_path, "-m", "demo", settings=settings, starter=starter) as server:
        session(server)
        server.process.terminate()
        assert server.end() == 0
    text = trace.read_text(errors="replace")
    assert "brim.worker" in text, "the worker was not watched"
    assert "bind(" in text, "the server's own socket was not seen"
    assert strangers(text) == []


def test_the_watch_sees_what_leaves() -> None:
    """Addresses, names that are looked up and sockets that are open to others are all found."""
    leaving = [
        '7 connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("1.2.3.4")}, 16)',
        "7 connect(3, {sa_family=AF_INET6, sin6_port=htons(443), sin6_flowinfo=htonl(0), "
        'inet_pton(AF_INET6, "2606::1", &sin6_addr), sin6_scope_id=0}, 28) = 0',
        '7 sendto(3, "x", 1, 0, {sa_family=AF_INET, sin_port=htons(53), '
        'sin_addr=inet_addr("9.9.9.9")}, 16) = 1',
        '7 bind(4, {sa_family=AF_INET, sin_port=htons(0), sin_addr=inet_addr("0.0.0.0")}, 16) = 0',
        '7 connect(5, {sa_family=AF_UNIX, sun_path="/var/run/nscd/socket"}, 110) = -1 ENOENT',
    ]
    staying = [
        '7 bind(4, {sa_family=AF_INET, sin_port=htons(0), sin_addr=inet_addr("127.0.0.1")}, 16)',
        '7 sendto(5, "HTTP/1.1 200 OK", 15, 0, NULL, 0) = 15',
        "7 bind(9, {sa_family=AF_NETLINK, nl_pid=0, nl_groups=00000000}, 12) = 0",
    ]
    assert strangers("\n".join([*leaving, *staying])) == leaving


_INSIDE = """
import fcntl, socket, struct, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
with socket.socket() as control:
    # Bring up the loopback interface: a new network namespace has it, but down.
    fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))
try:
    socket.create_connection(("1.1.1.1", 53), timeout=1).close()
except OSError:
    pass
else:
    sys.exit("there is a network")
import test_security_network as this
from support.server_process import ServerProcess
directory = Path(sys.argv[1])
with ServerProcess(directory, "-m", "demo", settings={"cache.min_tokens": 8}) as server:
    this.session(server)
    server.process.terminate()
    assert server.end() == 0
print("all of it worked")
"""


def test_a_session_needs_no_network(tmp_path: Path) -> None:
    """With loopback as the only interface everything works, from the start to the end."""
    require_engine("llamacpp")
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("a network namespace of its own needs unshare and root")
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [
            unshare,
            "-n",
            sys.executable,
            "-c",
            _INSIDE,
            str(tmp_path),
            str(tests),
            str(tests / "e2e"),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    if "Operation not permitted" in done.stderr and "unshare" in done.stderr:
        pytest.skip("this system gives out no network namespaces")
    assert done.returncode == 0, done.stderr
    assert "all of it worked" in done.stdout
