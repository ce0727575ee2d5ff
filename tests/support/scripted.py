"""A runtime that really streams, on cue, without a model or a process; and ASGI exchanges with it.

`ScriptedRuntime` implements `runtime.api.Runtime`.  Its answers echo a text token by token, and can
fail, wait for a signal, or be watched for how they ended.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.applications import Starlette

from brim.core.answer import (
    Delta,
    ErrorInfo,
    FinishReason,
    MovedLine,
    OverflowReport,
    Timings,
    TokenLogprob,
)
from brim.core.cache import CacheReport, CacheSource
from brim.core.memory import Footprint, MemoryTerms
from brim.core.model import ModelSpec
from brim.core.plan import Objective, Plan
from brim.core.request import OverflowPolicy, Request
from brim.core.stance import Stance
from brim.errors import BrimError
from brim.ledger.entry import Statement
from brim.runtime.api import ModelState, ModelStatus
from brim.telemetry.event_log import EventLog


def make_plan(name: str = "small") -> Plan:
    model = ModelSpec(
        name=name,
        paths=(f"/models/{name}.gguf",),
        format="gguf",
        architecture="llama",
        fingerprint="0123456789abcdef0123",
        num_parameters=1_000_000,
        weights_bytes=2_000_000,
        num_layers=2,
        hidden_size=128,
        num_heads=2,
        num_kv_heads=(1, 1),
        key_dim=64,
        value_dim=64,
        vocab_size=4096,
        trained_context_tokens=8192,
        quant="F16",
        chat_template="{{ messages }}",
    )
    memory = MemoryTerms(weights_bytes=2, kv_bytes=3, compute_bytes=5, overhead_bytes=7)
    return Plan(
        model=model,
        engine="llamacpp",
        objective=Objective.DECODE,
        context_tokens=8192,
        kv_tokens=16384,
        max_sequences=8,
        max_batch_tokens=512,
        micro_batch_tokens=512,
        kv_type_k="q8_0",
        kv_type_v="f16",
        flash_attention=True,
        repack_weights=False,
        num_threads=2,
        num_batch_threads=2,
        environment={},
        memory=memory,
        reasons={"context": "default"},
    )


class ScriptedAnswer:
    """Streams the runtime's pieces to every choice, `batch_size` steps at a time."""

    def __init__(self, runtime: "ScriptedRuntime", request: Request) -> None:
        self.runtime = runtime
        self.request = request
        self.plan = runtime.plan
        self.num_prompt_tokens = runtime.num_prompt_tokens
        self.max_tokens = request.max_tokens or 2048
        self.queue_place = runtime.queue_place
        self.overflow = runtime.overflow
        self.instead_of = runtime.instead_of
        self.moved_lines = runtime.moved_lines
        self.num_batches_read = 0
        self.is_finished = False
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        waiting: list[Delta] = []
        for position, deltas in enumerate(self._steps()):
            await self.runtime.gate(self, position)
            if self.is_cancelled:
                return
            waiting += deltas
            if (position + 1) % self.runtime.batch_size == 0:
                self.num_batches_read += 1
                yield waiting
                waiting = []
        self.is_finished = True
        if waiting:
            yield waiting

    def _steps(self) -> list[list[Delta]]:
        indexes = range(self.request.num_choices)
        steps = [[self._delta(index, piece) for index in indexes] for piece in self.runtime.pieces]
        return steps if self.runtime.breaks_off else [*steps, [self._last(i) for i in indexes]]

    def _delta(self, index: int, piece: bytes) -> Delta:
        num_logprobs = self.request.sampling.num_logprobs
        logprobs: tuple[TokenLogprob, ...] = ()
        if num_logprobs is not None:
            top = tuple((token, b"t%d" % token, -float(token)) for token in range(num_logprobs))
            logprobs = (TokenLogprob(7, piece, self.runtime.logprob, top),)
        text = piece.decode("utf-8", "ignore")
        return Delta(index=index, text=text, num_tokens=1, logprobs=logprobs)

    def _last(self, index: int) -> Delta:
        if self.runtime.failure is not None:
            error = ErrorInfo.of(self.runtime.failure)
            return Delta(index=index, finish_reason=FinishReason.ERROR, error=error)
        num_cached_tokens = self.num_prompt_tokens if index else self.runtime.num_cached_tokens
        cache = msgspec.structs.replace(self.runtime.cache, num_tokens=num_cached_tokens)
        timings = Timings(
            queue_s=0.0010000001,
            prefill_s=0.02,
            decode_s=0.3,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=num_cached_tokens,
            num_completion_tokens=len(self.runtime.pieces),
            seed=100 + index,
            cache=cache,
        )
        reason = self.runtime.finish_reason
        stop = self.request.stop[0] if self.request.stop else None
        return Delta(index=index, finish_reason=reason, stop_string=stop, timings=timings)


Gate = Callable[[ScriptedAnswer, int], Awaitable[None]]


async def open_gate(answer: ScriptedAnswer, position: int) -> None:
    await asyncio.sleep(0)


class ScriptedRuntime:
    """Implements Runtime; every attribute is part of the script."""

    def __init__(self) -> None:
        self.plan = make_plan()
        self.name = "small"
        self.pieces = [b"Hello", b" ", "wörld".encode(), b"!\n"]
        self.num_prompt_tokens = 11
        self.finish_reason = FinishReason.STOP
        self.failure: BrimError | None = None
        self.breaks_off = False
        self.batch_size = 1
        self.logprob = -0.25
        self.refusal: BaseException | None = None
        self.draining = False
        self.gate: Gate = open_gate
        self.before_submit: Callable[[Request], Awaitable[None]] | None = None
        self.answers: list[ScriptedAnswer] = []
        self.states = [ModelState.READY]
        self.account: Statement | None = None
        self.status_fields: dict[str, Any] = {}
        """More fields of every model's status."""
        self.overflow_policy = OverflowPolicy.REJECT
        self.queue_place = 0
        self.overflow: OverflowReport | None = None
        self.moved_lines: tuple[MovedLine, ...] = ()
        self.instead_of: str | None = None
        self.event_log = EventLog()
        self.current_stance = Stance()
        self.progress: float | None = None
        """Of the load that requests wait for."""
        self.num_cached_tokens = 3
        self.cache = CacheReport(source=CacheSource.MEMORY)
        """What the first prompt finds, but for its number of tokens."""

    def models(self) -> list[ModelStatus]:
        footprint = Footprint(weights_bytes=2, mapped_weights_bytes=2, kv_bytes=3, compute_bytes=5)
        return [
            ModelStatus(
                name=f"{self.name}{number}" if number else self.name,
                state=state,
                created_unix_s=1_700_000_000,
                plan=self.plan,
                pid=4321,
                footprint=footprint,
                overflow=self.overflow_policy,
                **self.status_fields,
            )
            for number, state in enumerate(self.states)
        ]

    def statement(self) -> Statement | None:
        return self.account

    def stance(self) -> Stance:
        return self.current_stance

    def load_progress(self, model: str) -> float | None:
        return self.progress

    def is_draining(self) -> bool:
        return self.draining

    async def submit(self, request: Request) -> ScriptedAnswer:
        if self.before_submit is not None:
            await self.before_submit(request)
        if self.refusal is not None:
            raise self.refusal
        answer = ScriptedAnswer(self, request)
        self.answers.append(answer)
        return answer


class Reply(msgspec.Struct):
    """One response, as ASGI messages said it."""

    status: int
    headers: dict[str, str]
    parts: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def events(self) -> list[Any]:
        """Data of each event; `[DONE]` stays a string, comments are left out."""
        blocks = [block for block in self.body.decode().split("\n\n") if block]
        data = [block.removeprefix("data: ") for block in blocks if block.startswith("data: ")]
        return [line if line == "[DONE]" else msgspec.json.decode(line) for line in data]


class Exchange:
    """One request in the hands of an app, at the level of ASGI messages.

    Nothing is buffered between app and test: `on_send` is awaited for every message, so that a test
    can be a slow client, and `leave` is a client that closes its connection.
    """

    def __init__(self, app: Starlette, scope: dict[str, Any], body: list[bytes]) -> None:
        self._app = app
        self._scope = scope
        self._body = list(body)
        self._left = asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.on_send: Callable[[bytes], Awaitable[None]] | None = None

    def leave(self) -> None:
        self._left.set()

    async def run(self) -> Reply:
        await self._app(self._scope, self._receive, self._send)
        return Reply(self.status, self.headers, self.parts)

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            part = self._body.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._body)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert not self.status, "a second response was started"
            self.status = message["status"]
            raw = [(name.decode(), value.decode()) for name, value in message["headers"]]
            self.headers = dict(raw)
            assert len(self.headers) == len(raw), "a header was sent twice"
        else:
            self.parts.append(message["body"])
            if self.on_send is not None:
                await self.on_send(message["body"])


class Client:
    """Makes exchanges with one app."""

    def __init__(self, app: Starlette) -> None:
        self.app = app

    def exchange(
        self,
        method: str,
        path: str,
        body: list[bytes] | None = None,
        headers: dict[str, str] | None = None,
    ) -> Exchange:
        given = {"host": "127.0.0.1:2746", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 2746),
        }
        return Exchange(self.app, scope, [b""] if body is None else body)

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.exchange("GET", path, headers=headers).run()

    async def post(self, path: str, body: object, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return await self.exchange("POST", path, [data], headers).run()

    async def chat(self, **fields: Any) -> Reply:
        return await self.post("/v1/chat/completions", chat_body(**fields))

    async def complete(self, **fields: Any) -> Reply:
        return await self.post("/v1/completions", {"model": "small", "prompt": "def f(", **fields})


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": "Hi"}], **fields}


async def settle() -> None:
    """Let tasks that were cancelled or woken run; no time passes."""
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(exchange: Exchange) -> AsyncIterator["asyncio.Task[Reply]"]:
    task = asyncio.create_task(exchange.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait((task,))
