"""How fast clients learn of a killed worker, and how fast the model answers again.

A real `brim serve` streams to eight HTTP clients; its worker gets SIGKILL; each client's wait for
its error event is measured from the kill, and so is the answer to a request sent right after it.
The aim is an error within a second for every client.

    python benches/worker_death.py [MODEL] [--repetitions 5]
"""

import argparse
import http.client
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.server_process import ServerProcess

NUM_CLIENTS = 8
AIM_S = 1.0


class Client(threading.Thread):
    """Streams one long completion and notes when its error event came."""

    def __init__(self, port: int, model: str) -> None:
        super().__init__()
        self.has_text = threading.Event()
        self.error_at_s: float | None = None
        self._port = port
        self._body = json.dumps(
            {
                "model": model,
                "prompt": "def f(x):",
                "max_tokens": 900,
                "ignore_eos": True,
                "stream": True,
            }
        )

    def run(self) -> None:
        """Read to the end of the stream."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("POST", "/v1/completions", self._body)
        for line in connection.getresponse():
            if line.startswith(b'data: {"error"'):
                self.error_at_s = time.monotonic()
            elif line.startswith(b"data: "):
                self.has_text.set()
        connection.close()


def one_death(server: ServerProcess, model: str) -> tuple[list[float], float]:
    """Seconds from the kill to each client's error, and to the next request's answer."""
    clients = [Client(server.port, model) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.has_text.wait()
    killed_at_s = time.monotonic()
    os.kill(server.ps()[0]["pid"], signal.SIGKILL)
    short = {"model": model, "prompt": "def g(x):", "max_tokens": 1}
    status, answer = server.ask("POST", "/v1/completions", short)
    answered_s = time.monotonic() - killed_at_s
    if status != 200:
        raise SystemExit(f"the next request was not served: {answer}")
    for client in clients:
        client.join()
    errors = [client.error_at_s for client in clients]
    if None in errors:
        raise SystemExit("a client's stream ended without an error event")
    return [at_s - killed_at_s for at_s in errors if at_s is not None], answered_s


def main() -> int:
    """Kill, measure, print; exit 1 where a client waited longer than the aim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    noticed: list[float] = []
    answered: list[float] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        ServerProcess(Path(directory), "-m", args.model) as server,
    ):
        name = server.ps()[0]["name"]
        for _ in range(args.repetitions):
            errors, next_s = one_death(server, name)
            noticed += errors
            answered.append(next_s)
    figures = {
        "error_event_median_s": statistics.median(noticed),
        "error_event_max_s": max(noticed),
        "next_answer_median_s": statistics.median(answered),
        "next_answer_max_s": max(answered),
    }
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:24} {value:.3f}")
    return 0 if max(noticed) <= AIM_S else 1


if __name__ == "__main__":
    sys.exit(main())
