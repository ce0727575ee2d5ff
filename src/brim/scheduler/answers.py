"""Drawn tokens become deltas: text that never splits a character or a stop string, and endings."""

from brim.core.answer import Delta, ErrorInfo, FinishReason, TokenLogprob
from brim.core.step import Sampled
from brim.core.tokenizer import Tokenizer
from brim.errors import BrimError
from brim.scheduler.sequence import Choice

Deltas = list[tuple[int, Delta]]


def advance(choice: Choice, sampled: Sampled, tokenizer: Tokenizer, now_s: float) -> Delta | None:
    """Take one drawn token; the delta, if there is anything to tell, with an ending if it ends.

    Where the choice goes on, the token is pending: the next step feeds it.
    """
    token = sampled.token
    choice.num_tokens += 1
    choice.num_unsent += 1
    if choice.first_token_s is None:
        choice.first_token_s = now_s
    if token in tokenizer.eog_tokens:
        return ending(choice, now_s, FinishReason.STOP, choice.stream.finish())
    piece = choice.stream.push(token)
    logprobs = () if sampled.logprob is None else (_token_logprob(sampled, tokenizer),)
    if piece.stop_string is not None:
        return ending(choice, now_s, FinishReason.STOP, piece.text, logprobs, piece.stop_string)
    if choice.num_tokens >= choice.job.max_tokens:
        text = piece.text + choice.stream.finish()
        return ending(choice, now_s, FinishReason.LENGTH, text, logprobs)
    choice.pending = token
    if not (piece.text or logprobs):
        return None
    delta = Delta(
        index=choice.index, text=piece.text, num_tokens=choice.num_unsent, logprobs=logprobs
    )
    choice.num_unsent = 0
    return delta


def ending(
    choice: Choice,
    now_s: float,
    reason: FinishReason,
    text: str = "",
    logprobs: tuple[TokenLogprob, ...] = (),
    stop_string: str | None = None,
    error: ErrorInfo | None = None,
) -> Delta:
    """A choice's last delta."""
    return Delta(
        index=choice.index,
        text=text,
        num_tokens=choice.num_unsent,
        logprobs=logprobs,
        finish_reason=reason,
        stop_string=stop_string,
        timings=choice.timings(now_s),
        error=error,
    )


def error_deltas(ticket: int, num_choices: int, error: BrimError) -> Deltas:
    """The ending of a request that never ran: the error, for every choice."""
    info = ErrorInfo.of(error)
    return [
        (ticket, Delta(index=index, finish_reason=FinishReason.ERROR, error=info))
        for index in range(num_choices)
    ]


def _token_logprob(sampled: Sampled, tokenizer: Tokenizer) -> TokenLogprob:
    piece = tokenizer.piece
    return TokenLogprob(
        token_id=sampled.token,
        piece=piece(sampled.token, special=True),
        logprob=0.0 if sampled.logprob is None else sampled.logprob,
        top=tuple((token, piece(token, special=True), value) for token, value in sampled.top),
    )
