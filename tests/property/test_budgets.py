"""Budgets under any order of requests, refusals, endings, crashes and midnights."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)
from support.app_desk import Desk

from brim.apps.day import DAY_S, day_of
from brim.apps.usage import read_reserved, read_usage
from brim.core.app import App, Budgets
from brim.errors import OverBudget, RateLimited

BUDGETS = {"a": 1000, "b": 50, "free": None}

APPS = st.sampled_from(sorted(BUDGETS))


@dataclass(frozen=True)
class Begun:
    """A request in work, as the model of the test knows it."""

    app: str
    request_id: str
    day: str
    num_prompt: int
    bound: int


class Server(RuleBasedStateMachine):
    """A server with three apps, beside plain sums of what each must have used."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.desk = Desk(Path(self.directory.name) / "usage.sqlite")
        for name, tokens in BUDGETS.items():
            self.desk.apps[name] = App(name=name, budgets=Budgets(tokens=tokens))
        self.in_work: set[Begun] = set()
        self.used: dict[tuple[str, str], int] = {}
        self.counted: dict[str, int] = dict.fromkeys(BUDGETS, 0)
        self.num_begun = 0

    def teardown(self) -> None:
        self.desk.meter.close()
        self.directory.cleanup()

    @property
    def today(self) -> str:
        return day_of(self.desk.unix_s)

    def count(self, request: Begun, tokens: int) -> None:
        """What the request must have cost, and that it was one."""
        key = request.app, request.day
        self.used[key] = self.used.get(key, 0) + tokens
        self.counted[request.app] += 1
        self.in_work.discard(request)

    @rule(
        target=requests,
        app=APPS,
        num_prompt=st.integers(0, 600),
        wanted=st.integers(1, 3000),
        num_choices=st.integers(1, 3),
    )
    def begin(
        self, app: str, num_prompt: int, wanted: int, num_choices: int
    ) -> Begun | MultipleResults[Begun]:
        """A request comes; it is cut to what is left, or refused for a reason that holds."""
        meter, budget = self.desk.meter, BUDGETS[app]
        used = self.used.get((app, self.today), 0)
        reserved = sum(
            each.num_prompt + each.bound
            for each in self.in_work
            if (each.app, each.day) == (app, self.today)
        )
        try:
            meter.enter(app)
            bound = meter.answer_bound(
                app, num_prompt_tokens=num_prompt, num_choices=num_choices, max_tokens=wanted
            )
        except OverBudget:
            assert budget is not None
            assert used + num_prompt + num_choices > budget or used >= budget
            return multiple()
        except RateLimited:
            assert budget is not None
            assert used + num_prompt + num_choices <= budget
            assert used + reserved + num_prompt + num_choices > budget
            return multiple()
        assert 1 <= bound <= wanted
        if budget is not None and bound < wanted:
            assert 0 <= budget - used - reserved - num_prompt - bound * num_choices < num_choices
        self.num_begun += 1
        begun = Begun(app, f"r{self.num_begun}", self.today, num_prompt, bound * num_choices)
        self.desk.run(begun.request_id, num_prompt, begun.bound, app=app)
        self.in_work.add(begun)
        return begun

    @rule(request=consumes(requests), part=st.floats(0, 1))
    def end(self, request: Begun, part: float) -> None:
        """A request ends somewhere before its bound; one that a crash cut ends no second time."""
        num_completion = int(part * request.bound)
        if request in self.in_work:
            self.count(request, request.num_prompt + num_completion)
        self.desk.meter.end(request.app, request.request_id, num_completion_tokens=num_completion)
        self.desk.meter.leave(request.app)

    @rule(request=requests)
    def end_again(self, request: Begun) -> None:
        """What has ended cannot end; what runs is left alone."""
        if request not in self.in_work:
            self.desk.meter.end(request.app, request.request_id, num_completion_tokens=7)

    @precondition(lambda self: self.num_begun)
    @rule()
    def crash(self) -> None:
        """The server is killed and another one starts: what was in work counts in full."""
        for request in tuple(self.in_work):
            self.count(request, request.num_prompt + request.bound)
        self.desk.start_again()

    @rule(days=st.sampled_from([0.3, 1.0]))
    def wait(self, days: float) -> None:
        """Time passes, past midnight or not."""
        self.desk.after(days * DAY_S)

    @invariant()
    def within_budget(self) -> None:
        """What is used and promised is what the sums say, and never more than the budget."""
        for app, budget in BUDGETS.items():
            left = self.desk.meter.left(app)
            assert left.used_tokens == self.used.get((app, self.today), 0)
            assert budget is None or left.used_tokens + left.reserved_tokens <= budget

    @precondition(lambda self: self.num_begun % 5 == 4)
    @invariant()
    def file_agrees(self) -> None:
        """Each request is in the file once, with its day: as used, or as promised."""
        self.desk.store.flush()
        lines = read_usage(self.desk.path, since_day="2027-01-15")
        sums = {(line.app, line.day): line.spent.num_tokens for line in lines if line.model}
        assert {key: tokens for key, tokens in sums.items() if tokens} == {
            key: tokens for key, tokens in self.used.items() if tokens
        }
        for app, num_requests in self.counted.items():
            assert num_requests == sum(line.spent.num_requests for line in lines if line.app == app)
        promised: dict[tuple[str, str], int] = {}
        for each in self.in_work:
            key = each.app, each.day
            promised[key] = promised.get(key, 0) + each.num_prompt + each.bound
        assert read_reserved(self.desk.path) == promised


Server.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBudgets = Server.TestCase
