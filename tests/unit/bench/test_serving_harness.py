"""Comparisons of servers: turns, failures, interruptions, machines that are not calm."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest

from brim.bench.answers import Answered
from brim.bench.client import Endpoint
from brim.bench.serving.alone import cold, restart, single
from brim.bench.serving.beside import longest_gap_s, shared_prefix, throughput
from brim.bench.serving.harness import Comparison, Wanted
from brim.bench.serving.mixed import Recorded, load_at_rates, load_figures, some_at_a_time
from brim.bench.serving.report import Report
from brim.bench.serving.session import Figure, Session
from brim.bench.serving.sizes import Sizes
from brim.bench.serving.workloads import Workload, choose
from brim.bench.workload import RecordedRequest, Turn
from brim.errors import ConfigError, EngineError
from brim.machine.scenario import parse_scenario
from brim.machine.simulated import SimulatedMachine

Scripted = Callable[..., AbstractAsyncContextManager[Endpoint]]

CALM = 'machine = "M4:10:16"\n[[step]]\nat_s = 0\nothers_bytes = 3_000_000_000\n'
BUSY = CALM + "busy_fraction = 0.5\nis_low_power = true\nis_on_battery = true\n"


def machine(scenario: str = CALM) -> SimulatedMachine:
    return SimulatedMachine(parse_scenario(scenario, where="x.toml"), lambda: 0.0)


def words_of(body: dict[str, object]) -> int:
    messages = body.get("messages")
    if isinstance(messages, list):
        return sum(len(message["content"].split()) for message in messages)
    return len(str(body["prompt"]).split())


class Fake:
    """Answers over a real socket as a server would that counts words; keeps what it was sent."""

    def __init__(self, **usage: object) -> None:
        self.bodies: list[dict[str, object]] = []
        self.refuses = ""
        self._usage = usage

    def __call__(self, _path: str, body: bytes) -> list[bytes]:
        fields = json.loads(body)
        self.bodies.append(fields)
        if self.refuses and self.refuses in body.decode():
            return [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 4\r\n\r\nnope"]
        choice = {"index": 0, "delta": {"content": "word "}}
        events: list[object] = [{"choices": [choice]} for _ in range(2)]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        usage = {"prompt_tokens": 10 + words_of(fields), "completion_tokens": fields["max_tokens"]}
        events.append({"choices": [], "usage": usage | self._usage})
        pieces = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
        pieces.append(b"data: [DONE]\n\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {sum(map(len, pieces))}\r\n\r\n".encode()
        return [head, *pieces]

    def prompts(self) -> list[str]:
        """What it was asked, without the probes."""
        texts = [json.dumps(b.get("messages", b.get("prompt"))) for b in self.bodies]
        return [text for text in texts if "1 2 3" not in text]


Run = Callable[[Session], object]


def wanted(endpoints: Sequence[Endpoint], *runs: tuple[str, object], **fields: object) -> Wanted:
    values: dict[str, object] = {
        "sources": tuple(endpoints),
        "workloads": tuple(Workload(name=name, run=run) for name, run in runs),  # type: ignore[arg-type]
        "repetitions": 1,
        "seed": 7,
        "sizes": Sizes().scaled(0.1),
        "patience_s": 0.0,
    }
    return Wanted(**(values | fields))  # type: ignore[arg-type]


@asynccontextmanager
async def two(scripted: Scripted, one: Fake, other: Fake) -> AsyncIterator[list[Endpoint]]:
    async with scripted(one) as first, scripted(other) as second:
        yield [
            Endpoint.parse(f"{name}=http://{where.host}:{where.port}#m")
            for name, where in (("one", first), ("two", second))
        ]


def compared(
    scripted: Scripted, one: Fake, other: Fake, *runs: tuple[str, object], **fields: object
) -> Report:
    async def main() -> Report:
        async with two(scripted, one, other) as endpoints:
            return await Comparison(wanted(endpoints, *runs, **fields), machine()).measure()

    return asyncio.run(main())


def test_every_server_reads_the_same_and_no_repetition_an_old_text(scripted: Scripted) -> None:
    """Equal turns are equal to the byte, and a second repetition has other words."""
    one, other = Fake(), Fake()
    report = compared(scripted, one, other, ("cold", cold), repetitions=2)
    # The first server also got the two prompts that tell how many tokens a word has.
    assert one.prompts()[2:] == other.prompts()
    long = [text for text in other.prompts() if len(text) > 200]
    assert len(long) == len(set(long)) == 2
    assert not report.complaints
    assert report.median("cold", "two", "num_prompt_tokens") == pytest.approx(140, abs=8)


def test_servers_take_turns_in_another_order_each_time(scripted: Scripted) -> None:
    """Repetitions and workloads begin with different servers."""
    report = compared(scripted, Fake(), Fake(), ("cold", cold), ("other", cold), repetitions=2)
    order = [(s.repetition, s.workload, s.server) for s in report.samples]
    assert [server for _, _, server in order] == [
        "one", "two", "two", "one", "two", "one", "one", "two",
    ]  # fmt: skip


def test_a_server_that_fails_has_a_row_that_says_so(scripted: Scripted) -> None:
    """The other one is measured as if nothing had happened."""
    broken = Fake()
    broken.refuses = '"max_tokens":6,'  # of the answers of `throughput`, scaled
    report = compared(scripted, Fake(), broken, ("throughput", throughput), ("cold", cold))
    failed = [row for row in report.rows if row.failure]
    assert [(row.workload, row.server) for row in failed] == [("throughput", "two")]
    assert "'two' failed at client" in str(failed[0].failure)
    assert "nope" in str(failed[0].failure)
    assert report.ratio("cold", "two", "ttft_s") is not None


def test_a_prompt_from_memory_is_not_cold(scripted: Scripted) -> None:
    """A server that says it had the prompt gets no figure for reading it."""
    remembers = Fake(prompt_tokens_details={"cached_tokens": 120})
    report = compared(scripted, Fake(), remembers, ("cold", cold))
    failed = [row for row in report.rows if row.failure]
    assert [row.server for row in failed] == ["two"]
    assert "had 120 of the" in str(failed[0].failure)


def test_an_answer_without_text_is_none(scripted: Scripted) -> None:
    """Tokens that are only counted do not make an answer."""
    silent = Fake()
    plain = silent.__call__

    async def main() -> Report:
        def script(path: str, body: bytes) -> list[bytes]:
            said = b"".join(plain(path, body))
            if b"1 2 3" not in body:
                said = said.replace(b'"word "', b'""     ')
            return [said]

        async with two(scripted, Fake(), script) as endpoints:  # type: ignore[arg-type]
            return await Comparison(wanted(endpoints, ("cold", cold)), machine()).measure()

    failed = [row for row in asyncio.run(main()).rows if row.failure]
    assert [row.server for row in failed] == ["two"]
    assert "no text came" in str(failed[0].failure)


def test_a_server_that_was_found_running_is_not_killed(scripted: Scripted) -> None:
    """The restart is skipped with the reason, for each of them."""
    report = compared(scripted, Fake(), Fake(), ("restart", restart))
    assert [row.server for row in report.rows] == ["one", "two"]
    assert all(str(row.failure).startswith("skipped: only a server") for row in report.rows)


def test_a_cancelled_run_gives_what_it_has(scripted: Scripted) -> None:
    """The turn that was cut short is left out, and the report says that it is not whole."""

    async def main() -> Report:
        reached = asyncio.Event()

        async def hangs(_session: Session) -> list[Figure]:
            reached.set()
            await asyncio.Event().wait()
            return []

        async with two(scripted, Fake(), Fake()) as endpoints:
            comparison = Comparison(wanted(endpoints, ("cold", cold), ("hang", hangs)), machine())
            task = asyncio.create_task(comparison.measure())
            await reached.wait()
            task.cancel()
            return await task

    report = asyncio.run(main())
    assert report.was_interrupted
    assert [sample.workload for sample in report.samples] == ["cold", "cold"]


def test_a_machine_that_does_other_things_is_refused_with_every_reason() -> None:
    """Nothing is asked of any server before."""
    nobody = [Endpoint.parse("one=http://127.0.0.1:9")]
    comparison = Comparison(wanted(nobody, ("cold", cold)), machine(BUSY))
    with pytest.raises(ConfigError) as caught:
        asyncio.run(comparison.measure())
    for reason in ("50% of the processors", "low-power mode", "on battery", "--force"):
        assert reason in caught.value.message


def test_a_machine_that_is_measured_anyway_is_told_of(scripted: Scripted) -> None:
    """Each reason stands in the report once."""

    async def main() -> Report:
        async with two(scripted, Fake(), Fake()) as endpoints:
            asked = wanted(endpoints, ("cold", cold), must_be_calm=False)
            return await Comparison(asked, machine(BUSY)).measure()

    assert len(asyncio.run(main()).complaints) == 3


def test_one_server_without_chats_has_all_of_them_complete(scripted: Scripted) -> None:
    """The work stays equal, and the report says why."""
    one, other = Fake(), Fake()
    other.refuses = '"messages"'
    report = compared(scripted, one, other, ("cold", cold))
    assert any("'two' answers no chats" in complaint for complaint in report.complaints)
    assert one.prompts()[2:] == other.prompts()
    assert all("messages" not in body for body in one.bodies[2:])


def test_a_second_turn_goes_on_from_the_answer(scripted: Scripted) -> None:
    """Four clients share the system prompt, and each quotes what it was told."""
    other = Fake()
    compared(scripted, Fake(), other, ("shared-prefix", shared_prefix))
    chats = [json.loads(text) for text in other.prompts()][1:]
    assert len(chats) == 8
    assert len({chat[0]["content"] for chat in chats}) == 1
    second = [chat for chat in chats if len(chat) == 4]
    assert [chat[2] for chat in second] == [{"role": "assistant", "content": "word word "}] * 4


def test_rates_and_rounds_send_recorded_requests(scripted: Scripted) -> None:
    """Both salt them, so that no repetition repeats another."""
    requests = (
        RecordedRequest(id="a", max_tokens=3, prompt="one"),
        RecordedRequest(id="b", max_tokens=2, messages=(Turn("user", "two"),)),
    )
    recorded = Recorded(
        requests=requests, rates_per_s=(1000.0,), requests_per_rate=3, concurrencies=(2,)
    )
    other = Fake()
    report = compared(
        scripted,
        Fake(),
        other,
        ("load", load_at_rates(recorded)),
        ("recorded", some_at_a_time(recorded)),
        repetitions=2,
    )
    assert report.median("load", "two", "num_failed", "1000/s") == 0
    assert report.median("recorded", "two", "output_tok_s", "2 at once") is not None
    ones = [text for text in other.prompts() if text.endswith('one"')]
    assert len(set(ones)) == 4  # a pass of each workload in each repetition


def test_a_gap_counts_where_it_touches_the_long_prompt() -> None:
    """Pauses before and after are the client's own; one across the end was begun beside it."""
    times = [0.0, 5.0, 5.1, 5.2, 9.0, 20.0]
    assert longest_gap_s(times, 5.05, 6.0) == pytest.approx(3.8)
    with pytest.raises(EngineError, match="no text while"):
        longest_gap_s([0.0, 1.0], 2.0, 3.0)


def answer(**fields: object) -> Answered:
    values: dict[str, object] = {
        "request_id": "a",
        "duration_s": 1.0,
        "ttft_s": 0.5,
        "time_per_token_s": 0.1,
    }
    return Answered(**(values | fields))  # type: ignore[arg-type]


def test_goodput_counts_whom_nothing_kept_waiting() -> None:
    """Slow, late, refused and broken answers are told apart."""
    answers = [
        answer(),
        answer(ttft_s=9.0),
        answer(time_per_token_s=0.5),
        answer(error="status 503: busy", status=503),
        answer(error="it broke off"),
    ]
    found = {figure.name: figure.value for figure in load_figures(answers, 2.0, at="1/s")}
    assert found["goodput_req_s"] == 0.5
    assert found["good_fraction"] == 0.2
    assert (found["num_refused"], found["num_failed"]) == (1, 1)
    assert found["ttft_p50_s"] == 0.5


def test_a_rate_at_which_nobody_is_answered_has_counts_alone() -> None:
    """There is no time to first token of nothing."""
    refused = [answer(error="status 503: busy", status=503)]
    names = {figure.name for figure in load_figures(refused, 1.0, at="1/s")}
    assert names == {"goodput_req_s", "good_fraction", "num_refused", "num_failed"}


def test_all_workloads_but_the_recorded_run_unless_named() -> None:
    """`load` sends the same requests already."""
    recorded = Recorded(requests=())
    assert [workload.name for workload in choose([], recorded)] == [
        "single", "cold", "stall", "shared-prefix", "agents", "restart", "throughput", "load",
        "depth",
    ]  # fmt: skip
    chosen = choose(["recorded", "single", "single"], recorded)
    assert [workload.name for workload in chosen] == ["recorded", "single"]
    assert chosen[1].run is single
