"""The scheduler as a state machine: requests come, leave and run in any order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.models import plan_for

from brim.core.answer import Delta, FinishReason
from brim.core.sampling import SamplingParams
from brim.core.step import StepPlan
from brim.engine.byte_tokenizer import ByteTokenizer
from brim.engine.toy import ToyEngine
from brim.errors import BrimError, EngineError
from brim.scheduler.loop import Scheduler
from brim.scheduler.sequence import ScheduledRequest

MAX_SEQUENCES = 4
KV_TOKENS = 400
MAX_OPEN_REQUESTS = 12
# Every open request may have to be read and decoded before the one that is looked at, a token a
# step at worst; and shorter prompts pass a longer one a bounded number of times.
MAX_STEPS_TO_AN_END = MAX_OPEN_REQUESTS * KV_TOKENS


class BreakableEngine(ToyEngine):
    """Fails the next step when told to, as a backend may at any time."""

    is_broken = False

    def submit(self, plan: StepPlan) -> None:
        if self.is_broken:
            self.is_broken = False
            raise EngineError("toy: the device is gone")
        super().submit(plan)


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, cancels, breaks and steps; the invariants are checked after each."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = BreakableEngine()
        self.owed: dict[int, set[int]] = {}
        self.next_ticket = 0

    @initialize(batch_tokens=st.sampled_from([4, 17, 64, 256]))
    def load(self, batch_tokens: int) -> None:
        plan = plan_for(
            "toy",
            context_tokens=200,
            kv_tokens=KV_TOKENS,
            max_sequences=MAX_SEQUENCES,
            max_batch_tokens=batch_tokens,
        )
        self.engine.load(plan)
        self.scheduler = Scheduler(self.engine, plan)

    @precondition(lambda self: len(self.owed) < MAX_OPEN_REQUESTS)
    @rule(
        num_prompt_tokens=st.integers(1, 150),
        max_tokens=st.integers(1, 60),
        num_choices=st.integers(1, 5),
        stop=st.sampled_from([(), ("e",), ("ab", " "), ("never!",)]),
        seed=st.integers(0, 2**31),
    )
    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int,
        num_choices: int,
        stop: tuple[str, ...],
        seed: int,
    ) -> None:
        self.next_ticket += 1
        request = ScheduledRequest(
            ticket=self.next_ticket,
            prompt_tokens=[(seed + i) % 256 for i in range(num_prompt_tokens)],
            max_tokens=max_tokens,
            num_choices=num_choices,
            stop=stop,
            sampling=SamplingParams(seed=seed, logit_bias=((ByteTokenizer.EOS, 2.0),)),
        )
        try:
            self.scheduler.add(request)
        except BrimError:
            return  # refused: nothing is owed
        self.owed[self.next_ticket] = set(range(num_choices))

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.owed)))
        self.scheduler.cancel(ticket)
        del self.owed[ticket]

    @rule()
    def break_engine(self) -> None:
        self.engine.is_broken = True

    @rule(num_steps=st.integers(1, 20))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.take(self.scheduler.step())

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def cancel_while_the_engine_runs(self, data: st.DataObject) -> None:
        plan = self.scheduler.schedule()
        result = error = None
        if plan is not None:
            try:
                result = self.engine.step(plan)
            except BrimError as exc:
                error = exc
        self.take(self.scheduler.take())
        if self.owed:
            self.cancel(data)
        if error is not None:
            self.scheduler.fail(error)
        elif result is not None:
            self.scheduler.absorb(result)
        self.take(self.scheduler.take())

    @precondition(lambda self: self.owed)
    @rule(data=st.data())
    def wait_for_one(self, data: st.DataObject) -> None:
        """No starvation: whichever request is picked ends within a bounded number of steps."""
        ticket = data.draw(st.sampled_from(sorted(self.owed)))
        for _ in range(MAX_STEPS_TO_AN_END):
            if ticket not in self.owed:
                return
            self.take(self.scheduler.step())
        raise AssertionError(f"request {ticket} starves")

    def take(self, deltas: list[tuple[int, Delta]]) -> None:
        for ticket, delta in deltas:
            assert ticket in self.owed, f"a delta for {ticket}, which has ended or was cancelled"
            assert delta.index in self.owed[ticket], f"choice {delta.index} of {ticket} goes on"
            if delta.finish_reason is not None:
                assert delta.finish_reason is not FinishReason.CANCELLED
                assert (delta.error is not None) == (delta.finish_reason is FinishReason.ERROR)
                self.owed[ticket].remove(delta.index)
                if not self.owed[ticket]:
                    del self.owed[ticket]

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert self.scheduler.num_sequences == len(self.engine._sequences) <= MAX_SEQUENCES
        assert self.engine._num_used <= KV_TOKENS
        assert self.scheduler.has_work == bool(self.owed)
        if not self.owed:
            assert self.scheduler.num_sequences == 0
            assert self.engine._num_used == 0

    def teardown(self) -> None:
        """Everything ends, and nothing is left behind."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(MAX_STEPS_TO_AN_END):
            if not self.scheduler.has_work:
                break
            self.take(self.scheduler.step())
        assert not self.owed
        self.limits_hold()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
