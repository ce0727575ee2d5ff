"""`python -m brim.worker --fd N --parent PID`: one model, one socket, one process.

The socket is one end of a pair that the gateway made, so nothing lies on the file system and
nobody else can connect.  The engine's libraries are imported on `Load`, when the plan has said
which: what must be in the environment before that was put there by the gateway.
"""

import argparse
import contextlib
import ctypes
import gc
import logging
import os
import queue
import resource
import signal
import socket
import sys
import time

from brim.core.answer import ErrorInfo
from brim.core.cache import CacheOptions
from brim.core.plan import Plan
from brim.engine import factory
from brim.engine.base import Engine
from brim.errors import BrimError
from brim.machine.qos import QosClass, set_qos_class
from brim.prefix_cache.store import Model, PrefixCache
from brim.worker import protocol
from brim.worker.loop import WorkerLoop
from brim.worker.outbox import Outbox
from brim.worker.prepare import PromptBuilder
from brim.worker.progress import ProgressReports
from brim.worker.reader import FrameThread

_PR_SET_PDEATHSIG = 1
"""Source: linux/prctl.h."""


def main() -> int:
    """Serve one gateway; the exit code is 0 after Shutdown or when the gateway has gone."""
    parser = argparse.ArgumentParser(prog="brim.worker")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the gateway")
    parser.add_argument("--parent", type=int, required=True, help="the gateway's process id")
    arguments = parser.parse_args()
    _settle_in(arguments.parent)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")

    sock = socket.socket(fileno=arguments.fd)
    sock.set_inheritable(False)
    outbox = Outbox(sock)
    loads: queue.SimpleQueue[protocol.Load] = queue.SimpleQueue()
    frames = FrameThread(sock, outbox, loads.put)
    try:
        outbox.send(protocol.Hello(protocol.PROTOCOL_VERSION, os.getpid()))
        frames.start()
        return _serve(loads.get(), frames, outbox)
    except ConnectionError:
        return 0  # the gateway has gone


def _settle_in(parent_pid: int) -> None:
    """What a process of this kind must arrange with the system, before anything can go wrong."""
    # Before any other thread starts, and before a backend is imported that starts some: they
    # inherit it.  Someone waits for the tokens, but the machine's own windows come first.
    set_qos_class(QosClass.USER_INITIATED)
    # A terminal sends Ctrl-C to the whole group; the gateway decides what it means for answers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Writing gigabytes of weights to a core file would hold the socket open, and with it the news
    # of the death, for as long as that takes.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        # The end of the socket is enough unless the backend hangs with the interpreter's lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:  # the gateway died before the line above
            os._exit(0)


def _serve(load: protocol.Load, frames: FrameThread, outbox: Outbox) -> int:
    started_s = time.monotonic()
    plan, options = load.plan, load.options
    try:
        engine = factory.create(plan.engine)
        engine.load(plan, ProgressReports(outbox.send))
        prompts = PromptBuilder(plan, engine.tokenizer, can_shift=engine.capabilities.can_shift)
        cache = None if options.cache is None else _open_cache(plan, engine, options.cache)
        loop = WorkerLoop(engine, plan, outbox, options, cache)
    except BrimError as error:
        outbox.send(protocol.LoadFailed(ErrorInfo.of(error)))
        return 1
    frames.attach(loop, prompts)
    outbox.send(
        protocol.Loaded(
            footprint=engine.footprint(),
            load_s=time.monotonic() - started_s,
            exact_profile=engine.capabilities.exact_profile,
            forks_share_kv=engine.capabilities.forks_share_kv,
        )
    )
    # What start-up left behind lives as long as the process: no collection need look at it again.
    gc.collect()
    gc.freeze()
    loop.run()
    return 0


def _open_cache(plan: Plan, engine: Engine, options: CacheOptions) -> PrefixCache:
    """This model's part of the store."""
    capabilities = engine.capabilities
    model = Model(name=plan.model.name, paths=plan.model.paths, identity=engine.kv_identity)
    return PrefixCache(
        options,
        model,
        can_cut=capabilities.can_truncate,
        can_export_range=capabilities.can_export_range,
    )


if __name__ == "__main__":
    sys.exit(main())
