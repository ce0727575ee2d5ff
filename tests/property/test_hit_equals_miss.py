"""Answers with reuse are those without, on real engines: memory, forks, cuts, disk and restarts.

Histories are edited as people and agents do it: conversations go on, are branched, cut and changed
in the middle, several at once, with restarts in between.  Each answer's tokens are compared with
those of an engine that reuses nothing, in the exact profile, where results do not depend on chunks
or company: so they must be equal, and any difference is KV that was wrong.  But where a pool has
holes llama.cpp adds in another order (docs/equality.md), and a tie within that falls either way.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import require_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mlx_models import family_dir
from support.models import plan_for

from brim.core.answer import TokenLogprob
from brim.core.cache import CacheOptions
from brim.core.plan import Plan
from brim.core.sampling import SamplingParams
from brim.engine import factory
from brim.engine.base import Engine
from brim.prefix_cache.store import Model, PrefixCache
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, num_logprobs=5)
ANSWER_TOKENS = 6
MAX_TURNS = 5
VOCABULARY = 250

KINDS = {
    "llamacpp": lambda: plan_for("llamacpp", max_sequences=6),
    "llamacpp-small-pool": lambda: plan_for("llamacpp", max_sequences=3, kv_tokens=640),
    "mlx": lambda: plan_for("mlx", max_sequences=6),
    "mlx-window": lambda: plan_for("mlx", path=family_dir("gemma3_text"), max_sequences=4),
    "mlx-recurrent": lambda: plan_for("mlx", path=family_dir("qwen3_next"), max_sequences=4),
    "mlx-convolution": lambda: plan_for("mlx", path=family_dir("lfm2"), max_sequences=4),
}

TIES = {"llamacpp": 0.2, "llamacpp-small-pool": 0.2}
"""Twice the largest difference of a logit that holes in the pool have made, by docs/equality.md; 0
elsewhere, where a single token that is lost far back shows, which changes as little."""

Answer = list[TokenLogprob]

Turns = tuple[tuple[int, ...], ...]
"""Of one conversation: tokens of each turn, the model's own included."""


class Server:
    """One engine with its scheduler, as a worker has them; `restart` leaves only the disk."""

    def __init__(self, plan: Plan, directory: Path | None) -> None:
        self._plan, self._directory = plan, directory
        self._next_ticket = 0
        self._start()

    def _start(self) -> None:
        self._engine: Engine = factory.create(self._plan.engine)
        self._engine.load(self._plan)
        self._cache = None if self._directory is None else self._open_cache(self._directory)
        self.scheduler = Scheduler(self._engine, self._plan, cache=self._cache, min_kept_tokens=16)

    def _open_cache(self, directory: Path) -> PrefixCache:
        capabilities = self._engine.capabilities
        return PrefixCache(
            CacheOptions(
                directory=str(directory),
                budget_bytes=2**30,
                daily_write_bytes=2**40,
                free_disk_floor_bytes=0,
                max_inflight_bytes=2**30,
                min_tokens=16,
            ),
            Model(name="model", paths=(), identity=self._engine.kv_identity),
            can_cut=capabilities.can_truncate,
            can_export_range=capabilities.can_export_range,
        )

    def close(self) -> None:
        if self._cache is not None:
            self._cache.flush()
            self._cache.close()
        self._engine.shutdown()

    def restart(self) -> None:
        self.close()
        self._start()

    def answer(self, conversations: list[Turns], *, use_cache: bool) -> list[Answer]:
        """The tokens that follow each of the conversations, which are asked for at once."""
        tickets = []
        for turns in conversations:
            ends = [sum(map(len, turns[: i + 1])) for i in range(len(turns))]
            self._next_ticket += 1
            tickets.append(self._next_ticket)
            self.scheduler.add(
                ScheduledRequest(
                    ticket=self._next_ticket,
                    prompt_tokens=[token for turn in turns for token in turn],
                    max_tokens=ANSWER_TOKENS,
                    sampling=GREEDY,
                    use_cache=use_cache,
                    turn_starts=(0, *ends[:-1]),
                    boundaries=tuple(ends[::2]),
                )
            )
        found: dict[int, Answer] = {ticket: [] for ticket in tickets}
        while self.scheduler.has_work:
            for ticket, delta in self.scheduler.step():
                assert delta.error is None, delta.error
                found[ticket] += delta.logprobs
        return [found[ticket] for ticket in tickets]


def ids_of(answer: Answer) -> tuple[int, ...]:
    return tuple(entry.token_id for entry in answer)


def assert_equal(found: Answer, reference: Answer, tie: float) -> None:
    """Tokens and their logprobs are the reference's, up to a tie that falls the other way."""
    for one, other in zip(found, reference, strict=True):
        if one.token_id != other.token_id:
            likeliest = other.top[0][2]
            ties = {token for token, _, logprob in other.top if likeliest - logprob <= tie}
            assert one.token_id in ties, (ids_of(found), ids_of(reference))
            return  # what follows follows another token
        assert abs(one.logprob - other.logprob) <= tie


@pytest.fixture(params=KINDS)
def make_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Servers of one kind; closed afterwards."""
    require_engine(request.param.split("-")[0])
    plan = KINDS[request.param]()
    made: list[Server] = []

    def make(name: str | None = None) -> Server:
        made.append(Server(plan, None if name is None else tmp_path / name))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def tie(request: pytest.FixtureRequest, make_server: Callable[..., Server]) -> float:
    """How far the likeliest tokens of a server of this kind may be apart, and fall either way."""
    return TIES.get(request.node.callspec.params["make_server"], 0.0)


edits = st.tuples(
    st.sampled_from(["new", "go on", "go on", "go on", "branch", "change", "cut"]),
    st.integers(0, 7),
    st.integers(0, 3),
    st.integers(8, 60),
)
rounds = st.lists(
    st.tuples(st.lists(edits, min_size=1, max_size=3), st.booleans()), min_size=2, max_size=5
)


def fresh(number: int, length: int) -> tuple[int, ...]:
    """A turn's tokens; equal numbers begin alike, as system prompts and questions do."""
    return tuple((31 * number + 7 * i + i * i) % VOCABULARY + 4 for i in range(length))


def edited(conversations: list[Turns], edit: tuple[str, int, int, int]) -> Turns:
    """What is asked next, by one edit of what was asked before."""
    kind, which, where, length = edit
    if kind == "new" or not conversations:
        return (fresh(where, 40),)
    turns = conversations[which % len(conversations)]
    if kind == "cut":
        return turns[: max(1, len(turns) - 2)]
    if kind == "change":
        place = where % len(turns)
        return (*turns[:place], fresh(which + 10, length))
    turn = fresh(which + 20 if kind == "branch" else where + 30, length)
    return (*turns, turn)[-MAX_TURNS:] if len(turns) < MAX_TURNS else (turns[0], turn)


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(history=rounds)
def test_reuse_changes_no_answer(
    make_server: Callable[..., Server], tie: float, history: list[tuple[list[Any], bool]]
) -> None:
    """Whatever was asked before, an answer is what the prompt alone gets."""
    server, reference = make_server("store"), make_server()
    conversations: list[Turns] = []
    for batch, restarts in history:
        asked = [edited(conversations, edit) for edit in batch]
        answers = server.answer(asked, use_cache=True)
        for turns, answer in zip(asked, answers, strict=True):
            assert_equal(answer, reference.answer([turns], use_cache=False)[0], tie)
        conversations = [
            *conversations,
            *((*turns, ids_of(answer)) for turns, answer in zip(asked, answers, strict=True)),
        ][-4:]
        if restarts:
            server.restart()


def test_every_kind_of_reuse_happens(make_server: Callable[..., Server]) -> None:
    """A second turn comes from memory, and a prompt after a restart from disk."""
    server = make_server("store")
    first: Turns = (fresh(1, 60), fresh(2, 30), fresh(3, 30))
    (found,) = server.answer([first], use_cache=True)
    answer = ids_of(found)
    server.answer([(*first, answer, fresh(4, 20))], use_cache=True)
    assert server.scheduler.stats().num_memory_tokens >= 60
    server.restart()
    server.answer([(*first, answer, fresh(5, 20))], use_cache=True)
    stats = server.scheduler.stats()
    assert stats.num_disk_tokens >= 60
