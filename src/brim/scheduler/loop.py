"""The scheduling loop: `schedule` builds one step, the engine runs it, `absorb` makes text of it.

Continuous batching: each step carries the pending token of every decoding choice, and as many
prompt rows as leave the step short.  No sockets, no threads, and the clock is handed in; one thread
calls everything here.  Every job that was added ends exactly once: each choice with one delta that
has a finish reason, or the whole job by `cancel`, without a word.
"""

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable

import msgspec

from brim.chat.stream import TextStream
from brim.core.answer import Delta, ErrorInfo, FinishReason, TokenLogprob
from brim.core.plan import Plan
from brim.core.step import Feed, Sampled, StepPlan, StepResult
from brim.engine.base import Engine
from brim.errors import BrimError, Busy, ConfigError, InvalidRequest
from brim.scheduler.admission import answer_bound, check_choices, check_fits, kv_bound
from brim.scheduler.sequence import Choice, Job, Prefill, ScheduledRequest

_log = logging.getLogger(__name__)

TILE_ROWS = 16
"""The cost of a step grows in stairs of this many rows; a step in between pays for the next stair.
Source: measured on llama.cpp's CPU backend, where 65 rows cost far more than 64."""

MIXED_STEP_ROWS = 64
"""Rows of a step in which something decodes.  With chunks of 64 a long prompt's first token comes
15 % later than without the decoding client; with 16, 32 and 48 it is 87, 36 and 20 %."""

PREFILL_STEP_ROWS = 512
"""Rows of a step in which nothing decodes: nobody waits for it, and larger gains no speed."""

AGEING_TOKENS = 64
"""A prompt that was passed over counts as this much shorter in the next step.  As many as a mixed
step reads, so that a prompt waits for later and shorter ones about as long as reading it takes."""

Deltas = list[tuple[int, Delta]]


class Scheduler:
    """Holds every request between `add` and its end, and fills the engine's steps.

    `step` does one round.  A caller that must do something between the parts (the worker reads
    cancellations while the engine runs) calls `schedule`, `absorb` or `fail`, and `take` itself.

    Args:
        engine: A loaded engine that nobody else steps.
        plan: The plan it was loaded with.
        clock: Seconds; only differences count.
        draw_seed: A fresh seed for a request that has none.

    Raises:
        ConfigError: The plan's steps are too small for its sequences.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        *,
        clock: Callable[[], float] = time.monotonic,
        # 31 bits: below every backend's "no seed" value.
        draw_seed: Callable[[], int] = lambda: secrets.randbits(31),
    ) -> None:
        if plan.max_batch_tokens < plan.max_sequences:
            raise ConfigError(
                f"the plan has {plan.max_sequences} sequences but steps of {plan.max_batch_tokens} "
                "rows; every sequence needs a row in each step"
            )
        self._engine = engine
        self._plan = plan
        self._clock = clock
        self._draw_seed = draw_seed
        self._eog_tokens = engine.tokenizer.eog_tokens
        self._forks_share_kv = engine.capabilities.forks_share_kv
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._prefilling: list[Prefill] = []
        self._decoding: list[Choice] = []
        self._num_added = 0
        self._num_sequences = 0
        self._kv_tokens_reserved = 0
        # The step that is under way: prompt chunks, and who draws a token, in the feeds' order.
        self._chunks: list[tuple[Prefill, int]] = []
        self._sampling: list[Choice] = []
        self._deltas: Deltas = []

    @property
    def has_work(self) -> bool:
        """Whether a step would get anything further."""
        return bool(self._jobs)

    @property
    def num_sequences(self) -> int:
        """Engine sequences that are open."""
        return self._num_sequences

    def tickets_in_step(self) -> set[int]:
        """Whose tokens the step that is under way feeds."""
        tickets = {choice.job.request.ticket for choice in self._sampling}
        tickets.update(prefill.choice.job.request.ticket for prefill, _ in self._chunks)
        return tickets

    def add(self, request: ScheduledRequest) -> None:
        """Accept a request; it waits until a sequence and KV are free for all its choices.

        Raises:
            ContextOverflow: The prompt fills the window, or `max_tokens` is over it.
            InvalidRequest: It has no tokens, too many choices, more KV than the whole pool, or a
                ticket that is in use.
        """
        num_prompt_tokens = len(request.prompt_tokens)
        if num_prompt_tokens == 0:
            raise InvalidRequest("the prompt has no tokens; send some text")
        check_choices(request.num_choices, self._plan)
        if request.ticket in self._jobs:
            raise InvalidRequest(f"ticket {request.ticket} is in use")
        max_tokens = answer_bound(
            num_prompt_tokens,
            request.max_tokens,
            context_tokens=self._plan.context_tokens,
            answer_tokens=request.max_tokens,
        )
        kv_tokens = kv_bound(
            num_prompt_tokens,
            max_tokens,
            request.num_choices,
            forks_share_kv=self._forks_share_kv,
        )
        check_fits(kv_tokens, self._plan)
        seed = request.sampling.seed
        job = Job(
            request,
            number=self._num_added,
            max_tokens=max_tokens,
            kv_tokens=kv_tokens,
            seed=self._draw_seed() if seed is None else seed,
        )
        self._num_added += 1
        self._jobs[request.ticket] = job
        self._waiting.append(job)

    def cancel(self, ticket: int) -> None:
        """Drop a request and free what it holds; no delta follows.

        An unknown ticket is ignored: the request may have ended while the word was on its way.
        """
        job = self._jobs.get(ticket)
        if job is not None:
            for choice in tuple(job.choices):
                self._close(choice)
            self._forget(job)

    def step(self) -> Deltas:
        """One round: schedule, run the engine, absorb."""
        plan = self.schedule()
        if plan is not None:
            try:
                result = self._engine.step(plan)
            except BrimError as error:
                self.fail(error)
            else:
                self.absorb(result)
        return self.take()

    def schedule(self) -> StepPlan | None:
        """The next step, or None where there is nothing to feed."""
        self._admit()

        # Decode: every choice feeds the token that it drew last.
        feeds = [Feed(choice.seq_id, (choice.pending,)) for choice in self._decoding]
        self._sampling = self._decoding.copy()
        self._chunks = []

        # Prefill: shortest remaining prompt first, so that a short question is not held up by a
        # document, until ageing has made up the difference.
        if self._prefilling:
            self._prefilling.sort(key=_reading_order)
            num_rows_left = self._num_prefill_rows(len(feeds))
            for prefill in self._prefilling:
                num_rows = min(prefill.num_remaining, num_rows_left)
                if num_rows == 0:
                    prefill.age += 1
                    continue
                num_rows_left -= num_rows
                start, end = prefill.num_done, prefill.num_done + num_rows
                prompt_tokens = prefill.choice.job.request.prompt_tokens
                is_last = end == len(prompt_tokens)
                feeds.append(Feed(prefill.choice.seq_id, prompt_tokens[start:end], is_last))
                self._chunks.append((prefill, num_rows))
                if is_last:
                    self._sampling.append(prefill.choice)

        return StepPlan(feeds) if feeds else None

    def absorb(self, result: StepResult) -> None:
        """Make deltas of what the scheduled step drew.  Choices cancelled meanwhile are skipped."""
        now_s = self._clock()
        for prefill, num_rows in self._chunks:
            prefill.num_done += num_rows
            if prefill.num_remaining == 0 and prefill.choice.is_open:
                self._finish_prefill(prefill)
        for choice, sampled in zip(self._sampling, result.sampled, strict=True):
            if choice.is_open:
                self._accept(choice, sampled, now_s)
        self._sampling = []
        self._chunks = []

    def fail(self, error: BrimError) -> None:
        """End what was in the scheduled step, because the engine refused or broke it.

        Without KV room the engine has changed nothing, so only the newest request pays for it.
        """
        jobs = {choice.job.number: choice.job for choice in self._sampling}
        jobs.update({prefill.choice.job.number: prefill.choice.job for prefill, _ in self._chunks})
        running = [jobs[number] for number in sorted(jobs) if jobs[number].choices]
        self._sampling = []
        self._chunks = []
        if isinstance(error, Busy) and running:
            # Admission promised room for every job, so this is a defect, not a full machine.
            _log.error("step without KV room, ending the newest of %d: %s", len(running), error)
            running = running[-1:]
        for job in running:
            self._end_job(job, error)

    def take(self) -> Deltas:
        """(ticket, delta) pairs since the last call, in order; the caller keeps the list."""
        deltas = self._deltas
        if deltas:
            self._deltas = []
        return deltas

    def _num_prefill_rows(self, num_decode_rows: int) -> int:
        """Prompt rows of a step: fill it to whole tiles, and never less than one tile."""
        if num_decode_rows == 0:
            num_rows = PREFILL_STEP_ROWS
        else:
            num_tiles = -(-num_decode_rows // TILE_ROWS) + 1
            num_rows = max(MIXED_STEP_ROWS, num_tiles * TILE_ROWS)
        return min(num_rows, self._plan.max_batch_tokens) - num_decode_rows

    def _admit(self) -> None:
        """Open sequences for waiting jobs, first come, first served, while they fit.

        A job that does not fit holds up those behind it: passing it would starve it.
        """
        while self._waiting:
            job = self._waiting[0]
            num_sequences = self._num_sequences + job.request.num_choices
            kv_tokens = self._kv_tokens_reserved + job.kv_tokens
            if num_sequences > self._plan.max_sequences or kv_tokens > self._plan.kv_tokens:
                return
            self._waiting.popleft()
            self._kv_tokens_reserved = kv_tokens
            job.admitted_s = self._clock()
            try:
                self._open(job)
            except BrimError as error:
                self._refuse(job, error)

    def _open(self, job: Job) -> None:
        """Give each choice its sequence and queue the prompt to be read."""
        request, tokenizer = job.request, self._engine.tokenizer
        # The last token that is drawn is never fed.
        num_fed = len(request.prompt_tokens) + job.max_tokens - 1
        for index in range(request.num_choices):
            sampling = msgspec.structs.replace(request.sampling, seed=job.seed + index)
            seq_id = self._engine.open(sampling, num_fed)
            self._num_sequences += 1
            job.choices.append(Choice(job, index, seq_id, TextStream(tokenizer, request.stop)))
        prefill = Prefill(job.choices[0], job.choices[1:])
        self._prefilling.append(prefill)
        if prefill.num_remaining == 0:
            self._finish_prefill(prefill)

    def _finish_prefill(self, prefill: Prefill) -> None:
        """The prompt is read: its choice decodes, and so do those that fork it."""
        first, prompt_tokens = prefill.choice, prefill.choice.job.request.prompt_tokens
        self._prefilling.remove(prefill)
        self._decoding.append(first)
        if not prefill.followers:
            return
        try:
            for choice in prefill.followers:
                if prefill.num_target:
                    self._engine.fork(first.seq_id, choice.seq_id, prefill.num_target)
                choice.num_cached_tokens = prefill.num_target
        except BrimError as error:
            self._end_job(first.job, error)
            return
        self._decoding += prefill.followers
        for choice in first.job.choices:
            choice.pending = prompt_tokens[-1]

    def _accept(self, choice: Choice, sampled: Sampled, now_s: float) -> None:
        """Turn one drawn token into text, or into the end of its choice."""
        token = sampled.token
        choice.num_tokens += 1
        choice.num_unsent += 1
        if choice.first_token_s is None:
            choice.first_token_s = now_s
        if token in self._eog_tokens:
            self._end(choice, now_s, FinishReason.STOP, choice.stream.finish())
            return
        piece = choice.stream.push(token)
        logprobs = () if sampled.logprob is None else (self._token_logprob(sampled),)
        if piece.stop_string is not None:
            self._end(choice, now_s, FinishReason.STOP, piece.text, logprobs, piece.stop_string)
        elif choice.num_tokens >= choice.job.max_tokens:
            text = piece.text + choice.stream.finish()
            self._end(choice, now_s, FinishReason.LENGTH, text, logprobs)
        else:
            choice.pending = token
            if piece.text or logprobs:
                delta = Delta(
                    index=choice.index,
                    text=piece.text,
                    num_tokens=choice.num_unsent,
                    logprobs=logprobs,
                )
                choice.num_unsent = 0
                self._deltas.append((choice.job.request.ticket, delta))

    def _token_logprob(self, sampled: Sampled) -> TokenLogprob:
        piece = self._engine.tokenizer.piece
        return TokenLogprob(
            token_id=sampled.token,
            piece=piece(sampled.token, special=True),
            logprob=0.0 if sampled.logprob is None else sampled.logprob,
            top=tuple((token, piece(token, special=True), value) for token, value in sampled.top),
        )

    def _end(
        self,
        choice: Choice,
        now_s: float,
        reason: FinishReason,
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        stop_string: str | None = None,
        error: ErrorInfo | None = None,
    ) -> None:
        """Give a choice its last delta and free its sequence."""
        delta = Delta(
            index=choice.index,
            text=text,
            num_tokens=choice.num_unsent,
            logprobs=logprobs,
            finish_reason=reason,
            stop_string=stop_string,
            timings=choice.timings(now_s),
            error=error,
        )
        self._deltas.append((choice.job.request.ticket, delta))
        self._close(choice)
        if not choice.job.choices:
            self._forget(choice.job)

    def _end_job(self, job: Job, error: BrimError) -> None:
        """End every open choice with the error."""
        now_s, info = self._clock(), ErrorInfo.of(error)
        for choice in tuple(job.choices):
            self._end(choice, now_s, FinishReason.ERROR, error=info)

    def _refuse(self, job: Job, error: BrimError) -> None:
        """End a job whose sequences could not all be opened."""
        for choice in tuple(job.choices):
            self._close(choice)
        self._forget(job)
        self._deltas += error_deltas(job.request.ticket, job.request.num_choices, error)

    def _close(self, choice: Choice) -> None:
        """Free a choice's sequence and take it out of whatever list it stands in."""
        choice.is_open = False
        choice.job.choices.remove(choice)
        self._engine.close(choice.seq_id)
        self._num_sequences -= 1
        if choice in self._decoding:
            self._decoding.remove(choice)
        else:
            self._prefilling = [p for p in self._prefilling if p.choice is not choice]

    def _forget(self, job: Job) -> None:
        """Give a job's KV bound back; nothing of it remains."""
        del self._jobs[job.request.ticket]
        if job.admitted_s is None:
            self._waiting.remove(job)
        else:
            self._kv_tokens_reserved -= job.kv_tokens


def error_deltas(ticket: int, num_choices: int, error: BrimError) -> Deltas:
    """The ending of a request that never ran: the error, for every choice."""
    info = ErrorInfo.of(error)
    return [
        (ticket, Delta(index=index, finish_reason=FinishReason.ERROR, error=info))
        for index in range(num_choices)
    ]


def _reading_order(prefill: Prefill) -> tuple[int, int]:
    """Sort key: prompt tokens left, less what waiting has earned; ties first come, first served."""
    return (prefill.num_remaining - AGEING_TOKENS * prefill.age, prefill.choice.job.number)
