"""The side-by-side harness: the same recorded requests against several servers in one run.

Servers are measured in turn within each repetition and in another order in the next, so that a
machine that drifts drifts for all; figures are compared pair by pair within a repetition.  Answers
are greedy and of equal length wherever the server takes `ignore_eos`; where it does not, the token
counts in the report say so.  Tokens are counted from each answer's `usage`, never from chunks.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from brim.bench.answers import Answered, read_answer
from brim.bench.client import Connection, Endpoint
from brim.bench.stats import Summary, pairwise_ratios, percentile, summarise
from brim.bench.workload import RecordedRequest
from brim.errors import ConfigError, InvalidRequest

Progress = Callable[[str], None]


# --- one server --------------------------------------------------------------------------------


class _ModelEntry(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelEntry]


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint that was reached, and what to send it."""

    endpoint: Endpoint
    model: str
    takes_ignore_eos: bool

    def body(self, request: RecordedRequest, **extra: object) -> bytes:
        """The JSON body of `request` for this server: streaming, greedy, with usage.

        Args:
            request: What to ask.
            extra: Further fields, or other values of these.
        """
        fields: dict[str, object] = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if request.messages is None:
            fields["prompt"] = request.prompt
        else:
            fields["messages"] = request.messages
        if self.takes_ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields | extra)

    async def ask(
        self, connection: Connection, request: RecordedRequest, **extra: object
    ) -> Answered:
        """Send one request, with further fields if any, and read its answer to the end."""
        reply = await connection.post(request.path, self.body(request, **extra))
        return read_answer(request.id, reply)


async def reach(endpoint: Endpoint) -> Target:
    """Find the server's model and whether it takes `ignore_eos`, with two short requests.

    Raises:
        ConfigError: Nothing answers there, or it lists no model.
        InvalidRequest: It refuses a plain completion; the message quotes it.
    """
    connection = Connection(endpoint)
    try:
        model = endpoint.model or await _first_model(connection)
        for takes_ignore_eos in (True, False):
            target = Target(endpoint=endpoint, model=model, takes_ignore_eos=takes_ignore_eos)
            probe = RecordedRequest(id="probe", max_tokens=2, prompt="1 2 3")
            answer = await target.ask(connection, probe)
            if answer.error is None:
                return target
        raise InvalidRequest(f"'{endpoint.name}' does not answer a completion: {answer.error}")
    finally:
        connection.close()


async def _first_model(connection: Connection) -> str:
    reply = await connection.get("/models")
    if reply.status == 503:
        raise ConfigError(
            f"'{connection.endpoint.name}' is not ready yet (503); wait and try again"
        )
    try:
        return msgspec.json.decode(reply.body, type=_ModelList).data[0].id
    except (msgspec.DecodeError, IndexError) as exc:
        raise ConfigError(
            f"'{connection.endpoint.name}' lists no models (status {reply.status}); "
            "name one as NAME=URL#MODEL"
        ) from exc


# --- rounds ------------------------------------------------------------------------------------


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """All requests once against one server."""

    endpoint: str
    concurrency: int
    repetition: int
    wall_s: float
    answers: tuple[Answered, ...]

    def figures(self) -> dict[str, float]:
        """The figures of this round by name; without answers only the counts."""
        good = [answer for answer in self.answers if answer.error is None]
        num_tokens = sum(answer.num_completion_tokens for answer in good)
        found = {
            "num_errors": float(len(self.answers) - len(good)),
            "num_completion_tokens": float(num_tokens),
            "num_prompt_tokens": float(sum(answer.num_prompt_tokens for answer in good)),
        }
        ttft = [answer.ttft_s for answer in good if answer.ttft_s is not None]
        rate = [a.time_per_token_s for a in good if a.time_per_token_s is not None]
        gaps = [a.longest_gap_s for a in good if a.longest_gap_s is not None]
        if ttft and rate and gaps:
            found |= {
                "output_tok_s": num_tokens / self.wall_s,
                "ttft_p50_s": percentile(ttft, 50),
                "ttft_p95_s": percentile(ttft, 95),
                "time_per_token_p50_s": percentile(rate, 50),
                "time_per_token_p95_s": percentile(rate, 95),
                "longest_gap_p95_s": percentile(gaps, 95),
            }
        return found


async def run_round(
    target: Target, requests: Sequence[RecordedRequest], concurrency: int, repetition: int
) -> Round:
    """Send all requests in order over `concurrency` connections, each taking the next one."""
    waiting = list(enumerate(requests))[::-1]
    answers: dict[int, Answered] = {}

    async def client() -> None:
        connection = Connection(target.endpoint)
        try:
            while waiting:
                place, request = waiting.pop()
                answers[place] = await target.ask(connection, request)
        finally:
            connection.close()

    loop = asyncio.get_running_loop()
    start_s = loop.time()
    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(client())
    return Round(
        endpoint=target.endpoint.name,
        concurrency=concurrency,
        repetition=repetition,
        wall_s=loop.time() - start_s,
        answers=tuple(answers[place] for place in range(len(requests))),
    )


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of one server at one concurrency over all repetitions."""

    endpoint: str
    concurrency: int
    figure: str
    value: Summary
    ratio: Summary | None
    """To the first endpoint, pair by pair; None where a pair lacks the figure or it is zero."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds as measured, and the rows made of them."""

    targets: tuple[Target, ...]
    repetitions: int
    num_requests: int
    rounds: tuple[Round, ...]
    rows: tuple[Row, ...]


async def compare(
    endpoints: Sequence[Endpoint],
    requests: Sequence[RecordedRequest],
    *,
    concurrencies: Sequence[int] = (1,),
    repetitions: int = 3,
    progress: Progress = lambda _: None,
) -> Report:
    """Measure all endpoints, interleaved; ratios are to the first one.

    Raises:
        ConfigError: Two endpoints share a name, or one cannot be reached.
        InvalidRequest: A server refuses a plain completion.
    """
    if len({endpoint.name for endpoint in endpoints}) < len(endpoints):
        raise ConfigError("two endpoints have the same name; give each its own")
    targets = [await reach(endpoint) for endpoint in endpoints]
    rounds: list[Round] = []
    for repetition in range(repetitions):
        salted = [request.salted(f"Session {repetition + 1}.") for request in requests]
        for concurrency in concurrencies:
            shift = repetition % len(targets)
            for target in targets[shift:] + targets[:shift]:
                progress(f"repetition {repetition + 1}/{repetitions}, {concurrency} at a time: "
                         f"{target.endpoint.name}")  # fmt: skip
                # Salted per concurrency too: a later pass must not find the earlier one's KV.
                passing = [request.salted(f"Clients {concurrency}.") for request in salted]
                rounds.append(await run_round(target, passing, concurrency, repetition))
    return Report(
        targets=tuple(targets),
        repetitions=repetitions,
        num_requests=len(requests),
        rounds=tuple(rounds),
        rows=tuple(rows(rounds, endpoints[0].name)),
    )


def rows(rounds: Sequence[Round], reference: str) -> list[Row]:
    """One row for each endpoint, concurrency and figure, in the order of the first repetition."""
    grouped: dict[tuple[str, int], list[dict[str, float]]] = {}
    for one in sorted(rounds, key=lambda one: one.repetition):
        grouped.setdefault((one.endpoint, one.concurrency), []).append(one.figures())
    found = []
    for (endpoint, concurrency), figures in grouped.items():
        for name in dict.fromkeys(name for one in figures for name in one):
            pairs = [
                (mine[name], other[name])
                for mine, other in zip(figures, grouped[reference, concurrency], strict=True)
                if name in mine and other.get(name, 0.0) > 0
            ]
            ratios = pairwise_ratios(*zip(*pairs, strict=True)) if pairs else []
            found.append(
                Row(
                    endpoint=endpoint,
                    concurrency=concurrency,
                    figure=name,
                    value=summarise([one[name] for one in figures if name in one]),
                    ratio=summarise(ratios) if ratios and endpoint != reference else None,
                )
            )
    return found
