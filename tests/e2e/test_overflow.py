"""Conversations that outgrow the window, by every policy, through a gateway with real engines."""

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from conftest import require_engine
from support.models import plan_for
from support.server_process import ServerProcess
from support.serving import CHATML, ask, collect, request, serving, text_of, toy_plan, until

from brim.chat.overflow import summary_prompt, with_summary
from brim.core.answer import FinishReason, OverflowReport, Timings
from brim.core.plan import Plan
from brim.core.request import Message, OverflowPolicy, Request
from brim.engine import factory
from brim.errors import ContextOverflow, InvalidRequest, Unsupported
from brim.runtime.gateway import Gateway
from brim.worker.prepare import BuiltPrompt, PromptBuilder

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_blocking")]

SYSTEM = Message(role="system", content="You write short Python functions. Names are in English.")
ANSWER_TOKENS = 24


def plan_of(engine: str, *, exact: bool = True) -> Plan:
    """A small window, so that a few turns fill it; greedy text does not depend on the batch."""
    require_engine(engine)
    if engine == "toy":
        return toy_plan(context_tokens=1024, kv_tokens=4096, max_sequences=4)
    plan = plan_for(engine, exact=exact, context_tokens=512, kv_tokens=2048, max_sequences=4)
    model = msgspec.structs.replace(plan.model, chat_template=CHATML)
    return msgspec.structs.replace(plan, model=model)


@pytest.fixture(params=["toy", "llamacpp"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_of(request.param)


@pytest.fixture
def shifting_plan() -> Plan:
    """Unquantised KV, whose keys llama.cpp can turn to another position."""
    return plan_of("llamacpp", exact=False)


@pytest.fixture
def mlx_plan() -> Plan:
    return plan_of("mlx")


class Turn(NamedTuple):
    """One request of a conversation, and what came of it."""

    request: Request
    text: str
    report: OverflowReport | None
    timings: Timings


def chat(plan: Plan, policy: str, messages: Sequence[Message], **fields: Any) -> Request:
    asked = request(model=plan.model.name, max_tokens=ANSWER_TOKENS)
    return msgspec.structs.replace(
        asked, messages=tuple(messages), overflow=OverflowPolicy(policy), **fields
    )


def question(number: int) -> Message:
    return Message(role="user", content=f"Write a function number {number} that sorts a list.")


async def say(gateway: Gateway, asked: Request) -> Turn:
    """One request to its end."""
    answer = await gateway.submit(asked)
    deltas = (await collect(answer))[0]
    assert deltas[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH), deltas
    assert deltas[-1].timings is not None
    return Turn(asked, text_of(deltas), answer.overflow, deltas[-1].timings)


async def converse(gateway: Gateway, plan: Plan, policy: str, num_turns: int) -> list[Turn]:
    """A conversation that grows by what the model answers."""
    messages, turns = [SYSTEM], []
    for number in range(1, num_turns + 1):
        messages.append(question(number))
        turn = await say(gateway, chat(plan, policy, messages))
        turns.append(turn)
        messages.append(Message(role="assistant", content=turn.text))
    return turns


async def prompts_of(plan: Plan, *, can_shift: bool = False) -> PromptBuilder:
    """Prompts as the model's worker makes them."""

    def load() -> PromptBuilder:
        engine = factory.create(plan.engine)
        engine.load(plan)
        return PromptBuilder(plan, engine.tokenizer, can_shift=can_shift)

    return await asyncio.to_thread(load)


def whole(prompts: PromptBuilder, asked: Request) -> BuiltPrompt:
    return prompts.build(msgspec.structs.replace(asked, overflow=OverflowPolicy.REJECT))


def kept_messages(turn: Turn) -> tuple[Message, ...]:
    """What of the request the model read."""
    assert turn.request.messages is not None
    removed = set() if turn.report is None else {t.index for t in turn.report.removed_turns}
    return tuple(m for index, m in enumerate(turn.request.messages) if index not in removed)


async def alone(gateway: Gateway, plan: Plan, messages: Sequence[Message]) -> str:
    """What the model says to these messages where nothing was computed before."""
    return await ask(gateway, chat(plan, "reject", messages, use_cache=False))


async def test_a_conversation_over_the_window_is_rejected_with_the_numbers(plan: Plan) -> None:
    """By default nothing is left out: the turn that is too long gets an error, not an answer."""
    async with serving(plan) as gateway:
        with pytest.raises(ContextOverflow, match=rf"context is {plan.context_tokens}; "):
            await converse(gateway, plan, "reject", 40)


@pytest.mark.parametrize("plan", ["toy", "llamacpp", "mlx"], indirect=True)
async def test_a_trimmed_conversation_goes_on_as_one_of_what_was_kept(plan: Plan) -> None:
    """From 85 % on the oldest turns go; the system prompt stays, and the answers refer to the rest.

    What is reported is exact: the model read the kept messages, token by token.
    """
    prompts = await prompts_of(plan)
    async with serving(plan) as gateway:
        turns = await converse(gateway, plan, "trim", 24)
        for turn in turns:
            num_whole = len(whole(prompts, turn.request).tokens)
            kept = kept_messages(turn)
            assert kept[0] == SYSTEM
            assert (turn.report is not None) is (num_whole > int(plan.context_tokens * 0.85))
            read = whole(prompts, msgspec.structs.replace(turn.request, messages=kept)).tokens
            assert turn.timings.num_prompt_tokens == len(read)
            if turn.report is not None:
                assert turn.report.num_tokens_before == num_whole
                assert turn.report.num_tokens_after == len(read)
                removed = sum(each.num_tokens for each in turn.report.removed_turns)
                assert removed == turn.report.num_removed_tokens == num_whole - len(read)
        trimmed = [turn for turn in turns if turn.report is not None]
        assert len(trimmed) > 8
        for turn in trimmed[::4]:
            assert turn.text == await alone(gateway, plan, kept_messages(turn))


async def test_a_trimmed_conversation_is_mostly_found_in_memory(plan: Plan) -> None:
    """The cut stays for several turns, in each of which all but the new turn is reused."""
    async with serving(plan) as gateway:
        turns = await converse(gateway, plan, "trim", 24)
    trimmed = [turn for turn in turns if turn.report is not None]
    moved = [len(a.report.removed_turns) != len(b.report.removed_turns)  # type: ignore[union-attr]
             for a, b in itertools.pairwise(trimmed)]  # fmt: skip
    assert moved.count(False) > moved.count(True)
    for (before, turn), has_moved in zip(itertools.pairwise(trimmed), moved, strict=True):
        if not has_moved:
            assert turn.timings.cache.num_tokens >= before.timings.num_prompt_tokens - 8


async def test_a_shifted_prompt_is_the_beginning_and_the_newest_tokens(plan: Plan) -> None:
    """Token by token: the same answer as to a prompt of those tokens."""
    prompts = await prompts_of(plan)
    async with serving(plan) as gateway:
        turns = await converse(gateway, plan, "trim", 24)
        long = chat(plan, "shift", turns[-1].request.messages or ())
        before = whole(prompts, long)
        assert len(before.tokens) > plan.context_tokens
        turn = await say(gateway, long)
        assert turn.report is not None
        num_kept = before.turn_starts[1]
        end = num_kept + turn.report.num_removed_tokens
        tokens = before.tokens[:num_kept] + before.tokens[end:]
        assert turn.report.num_tokens_before == len(before.tokens)
        assert turn.report.num_tokens_after == len(tokens) <= 0.85 * plan.context_tokens
        plain = chat(plan, "reject", (), use_cache=False)
        plain = msgspec.structs.replace(plain, messages=None, prompt_tokens=tuple(tokens))
        assert turn.text == await ask(gateway, plain)


async def test_an_answer_outgrows_the_window_where_the_engine_shifts() -> None:
    """It runs to its bound of two windows; the teaching engine's text shows that nothing else went.

    A cell of its cache is the hash of everything before it, and shifted cells keep theirs.
    """
    plan = plan_of("toy")
    wide = msgspec.structs.replace(plan, context_tokens=4096, kv_tokens=8192)
    texts = []
    for each, policy in [(plan, "shift"), (wide, "reject")]:
        async with serving(each) as gateway:
            turn = await say(gateway, chat(each, policy, [SYSTEM, question(1)], max_tokens=2000))
            texts.append(turn.text)
            assert (turn.timings.num_shifted_tokens > 0) is (policy == "shift")
            assert turn.timings.num_completion_tokens == 2000
    assert texts[0] == texts[1]


async def test_an_answer_of_llama_cpp_outgrows_its_window(shifting_plan: Plan) -> None:
    """What was shifted out is counted, and what was left always fitted the window."""
    plan = shifting_plan
    async with serving(plan) as gateway:
        turn = await say(gateway, chat(plan, "shift", [SYSTEM, question(1)], max_tokens=700))
    timings = turn.timings
    assert timings.num_completion_tokens == 700
    held = timings.num_prompt_tokens + timings.num_completion_tokens - timings.num_shifted_tokens
    assert plan.context_tokens / 4 < held <= plan.context_tokens + 1


async def test_an_answer_that_would_outgrow_the_window_is_refused_elsewhere(mlx_plan: Plan) -> None:
    """MLX's caches are not shifted; the sentence names what would do."""
    async with serving(mlx_plan) as gateway:
        asked = chat(mlx_plan, "shift", [SYSTEM, question(1)], max_tokens=700)
        with pytest.raises(Unsupported, match=r'"trim" or "summarize"'):
            await gateway.submit(asked)


@pytest.mark.parametrize("plan", ["toy", "llamacpp", "mlx"], indirect=True)
async def test_a_summary_takes_the_place_of_what_was_left_out(plan: Plan) -> None:
    """The model's own summary, made of the turns that went, ends the system prompt.

    The answer is the one to such a conversation, and the report counts all of it.
    """
    prompts = await prompts_of(plan)
    async with serving(plan) as gateway:
        turns = await converse(gateway, plan, "summarize", 16)
        summarised = [turn for turn in turns if turn.report is not None]
        turn = summarised[0]
        report = turn.report
        assert report is not None
        work = prompts.build(turn.request).to_summarize
        assert work is not None
        assert [message for piece in work.pieces for message in piece] == [
            (turn.request.messages or ())[each.index] for each in report.removed_turns
        ]
        asked = chat(plan, "reject", summary_prompt(work, 0, ""), max_tokens=work.max_tokens)
        greedy = msgspec.structs.replace(asked.sampling, ignore_eos=False)
        summary = (await ask(gateway, msgspec.structs.replace(asked, sampling=greedy))).strip()
        read = with_summary((SYSTEM,), kept_messages(turn)[1:], summary)
        assert turn.text == await alone(gateway, plan, read)
    num_kept = len(whole(prompts, chat(plan, "reject", kept_messages(turn))).tokens)
    num_read = len(whole(prompts, chat(plan, "reject", read)).tokens)
    assert report.num_tokens_after == turn.timings.num_prompt_tokens == num_read
    assert report.num_summary_tokens == num_read - num_kept
    assert report.num_removed_tokens == report.num_tokens_before - num_kept
    assert 0 < report.num_summary_completion_tokens <= work.max_tokens
    assert report.num_summary_prompt_tokens > report.num_summary_cached_tokens


async def test_a_summary_is_written_once_and_mostly_of_what_was_in_memory(plan: Plan) -> None:
    """While the cut stays, turns reuse it; writing it computes little but the instruction."""
    async with serving(plan) as gateway:
        turns = await converse(gateway, plan, "summarize", 20)
    reports = [turn.report for turn in turns if turn.report is not None]
    written = [report for report in reports if report.num_summary_completion_tokens]
    assert 1 <= len(written) < len(reports) / 2
    assert len({len(report.removed_turns) for report in reports}) == len(written)
    first = written[0]
    num_computed = first.num_summary_prompt_tokens - first.num_summary_cached_tokens
    assert num_computed < first.num_summary_prompt_tokens / 2


async def test_requests_at_once_wait_for_one_summary() -> None:
    """Three of one conversation are answered, and one of them paid."""
    plan = plan_of("toy")
    messages = [SYSTEM]
    for number in range(1, 12):
        messages += [question(number), Message(role="assistant", content="As you wish.")]
    async with serving(plan) as gateway:
        asked = [chat(plan, "summarize", [*messages, question(12)]) for _ in range(3)]
        turns = await asyncio.gather(*(say(gateway, each) for each in asked))
        stats = await gateway.worker_stats("toy")
        counts = gateway.models()[0].requests
    # The request that brim made for the summary is none of its clients'.
    assert counts.outcomes == {"length": 3}
    assert counts.num_completion_tokens == 3 * ANSWER_TOKENS
    reports = [turn.report for turn in turns if turn.report is not None]
    assert len(reports) == 3
    assert len({turn.text for turn in turns}) == 1
    num_written = sum(report.num_summary_completion_tokens for report in reports)
    assert num_written == max(report.num_summary_completion_tokens for report in reports) > 0
    assert stats.num_tokens == num_written + 3 * ANSWER_TOKENS


@pytest.mark.parametrize("num_yields", [1, 5, 50, 200])
async def test_a_client_that_leaves_takes_its_summary_with_it(num_yields: int) -> None:
    """Nothing runs for nobody."""
    plan = plan_of("toy")
    messages = [SYSTEM]
    for number in range(1, 12):
        messages += [question(number), Message(role="assistant", content="As you wish.")]
    async with serving(plan) as gateway:
        task = asyncio.ensure_future(
            gateway.submit(chat(plan, "summarize", [*messages, question(12)]))
        )
        for _ in range(num_yields):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).cancel()  # it was admitted before its client left
        await until(lambda: gateway.models()[0].num_running == 0)
        assert await ask(gateway, chat(plan, "reject", [SYSTEM, question(1)]))
        stats = await gateway.worker_stats("toy")
        assert (stats.num_prepared, stats.num_waiting) == (0, 0)


async def test_a_summary_that_fails_is_said_and_nothing_is_cut() -> None:
    """The error names what failed; the request is not answered without its summary."""
    plan = plan_of("toy")
    messages = [SYSTEM]
    for number in range(1, 12):
        messages += [question(number), Message(role="assistant", content="As you wish.")]
    # A template that refuses the instruction, as one may refuse anything.
    refusal = (
        "{% if 'Summarize' in messages[-1].content %}{{ raise_exception('no summaries') }}"
        "{% endif %}"
    )
    template = refusal + CHATML
    model = msgspec.structs.replace(plan.model, chat_template=template)
    async with serving(msgspec.structs.replace(plan, model=model)) as gateway:
        with pytest.raises(InvalidRequest, match=r"summarizing its older turns failed: .*no summ"):
            await gateway.submit(chat(plan, "summarize", [*messages, question(12)]))
        assert gateway.models()[0].num_running == 0


@pytest.mark.parametrize("policy", ["trim", "shift", "summarize"])
def test_what_was_done_is_in_the_response(policy: str, tmp_path: Path) -> None:
    """Over HTTP: the header has the number of tokens, the body all of it."""
    content = "Tell me all about it, and then some more. " * 40
    messages = [{"role": "system", "content": "Be brief."}]
    for _ in range(6):
        messages += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "It is so."},
        ]
    messages.append({"role": "user", "content": "And?"})
    body = {"model": "demo", "messages": messages, "max_tokens": 8, "temperature": 0}
    require_engine("llamacpp")
    with ServerProcess(tmp_path, "-m", "demo", "--context", "1024") as server:
        status, refused = server.ask("POST", "/v1/chat/completions", body)
        assert status == 400, refused
        assert "context is 1024" in refused["error"]["message"]
        body["brim"] = {"overflow": policy}
        status, answer = server.ask("POST", "/v1/chat/completions", body)
    assert status == 200, answer
    done = answer["brim"]["overflow"]
    assert done["policy"] == policy
    removed = done["num_tokens_before"] - done["num_tokens_after"] + done["num_summary_tokens"]
    assert done["num_removed_tokens"] == removed == answer["brim"]["num_trimmed_tokens"] > 0
    assert done["num_tokens_after"] == answer["usage"]["prompt_tokens"]
    assert (done["num_summary_tokens"] > 0) is (policy == "summarize")
    assert done["removed_turns"][0]["role"] == "user"
