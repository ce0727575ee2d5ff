"""What drawing a token costs on the device, against mlx-lm's own samplers in the same run.

Random logits of a large vocabulary, one row and eight; each figure is the median time from logits
to tokens on the host.  mlx-lm has one sampler for a batch, without penalties, DRY or typical, so
"everything" has no counterpart there.

    python benches/sampler_cost.py [--vocab 152000] [--repetitions 30] [--json]
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_sampler

from brim.core.sampling import SamplingParams
from brim.engine.dry import DryBreakers, dry_penalties
from brim.engine.mlx.sampler import Draw, SequenceSampler, draw

HISTORY_TOKENS = 4096
"""Longer than every window, so that costs per token show what they grow with."""

Sampler = Callable[[mx.array], mx.array]

EVERYTHING = SamplingParams(
    seed=1, top_k=100, typical_p=0.95, repeat_penalty=1.1, frequency_penalty=0.1,
    presence_penalty=0.1, dry_multiplier=0.8, xtc_probability=0.5, logit_bias=((5, 1.0),),
    num_logprobs=5, ignore_eos=True,
)  # fmt: skip

CASES: dict[str, tuple[SamplingParams, Sampler | None]] = {
    "greedy": (SamplingParams(temperature=0.0), make_sampler(0.0)),
    "defaults": (SamplingParams(seed=1), make_sampler(0.8, top_p=0.95, min_p=0.05, top_k=40)),
    "top-p alone": (
        SamplingParams(seed=1, top_k=0, min_p=0.0),
        make_sampler(0.8, top_p=0.95),
    ),
    "plain": (SamplingParams(seed=1, top_k=0, top_p=1.0, min_p=0.0), make_sampler(0.8)),
    "everything": (EVERYTHING, None),
}


class RandomVocabulary:
    """A tokenizer of random pieces: as many and as long as a large model's."""

    eog_tokens = frozenset({1, 2})
    bos_piece = eos_piece = ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        rng = random.Random(0)
        letters = bytes(range(32, 127)) + b"\n"
        self._pieces = [
            bytes(rng.choices(letters, k=rng.randint(2, 11))) for _ in range(vocab_size)
        ]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._pieces[token]

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")


def median_ms(work: Callable[[], object], repetitions: int) -> float:
    """Median time of one call, after two that warm caches up."""
    times = []
    for number in range(repetitions + 2):
        start = time.perf_counter()
        work()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(
    vocab_size: int, repetitions: int
) -> tuple[list[dict[str, float | str | None]], dict[str, float]]:
    """One line for each case and batch size, and what the host's part of DRY costs."""
    rng = np.random.default_rng(0)
    logits = mx.array((rng.standard_normal((8, vocab_size)) * 4).astype(np.float16))
    mx.eval(logits)
    history = rng.integers(0, 50, HISTORY_TOKENS).tolist()
    vocabulary = RandomVocabulary(vocab_size)
    breakers = DryBreakers(vocabulary)
    found = breakers.find(EVERYTHING)
    start = time.perf_counter()
    dry_penalties(rng.integers(0, vocab_size, 1024).tolist(), EVERYTHING, found)
    costs = {"dry_new_tokens_ms": 1e3 * (time.perf_counter() - start)}
    costs["dry_token_ms"] = median_ms(lambda: dry_penalties(history, EVERYTHING, found), 200)
    lines: list[dict[str, float | str | None]] = []
    for name, (params, theirs) in CASES.items():
        for num_rows in (1, 8):
            rows = [
                Draw(
                    SequenceSampler(
                        params, vocab_size=vocab_size, eog_tokens=frozenset({1, 2}),
                        dry_breakers=breakers,
                    ),
                    history,
                )
                for _ in range(num_rows)
            ]  # fmt: skip
            some = logits[:num_rows]
            ours_ms = median_ms(lambda: draw(some, rows).results(range(num_rows)), repetitions)  # noqa: B023
            theirs_ms = None if theirs is None else median_ms(their_draw(theirs, some), repetitions)
            lines.append(
                {"case": name, "rows": num_rows, "brim_ms": ours_ms, "mlx_lm_ms": theirs_ms}
            )
    return lines, costs


def their_draw(sampler: Sampler, logits: mx.array) -> Callable[[], object]:
    """As mlx-lm's generate_step does it: from logprobs."""

    def work() -> object:
        scores = logits.astype(mx.float32)
        tokens = sampler(scores - mx.logsumexp(scores, axis=-1, keepdims=True))
        return tokens.tolist()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--vocab", type=int, default=152_000)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    lines, costs = measure(args.vocab, args.repetitions)
    if args.json:
        print(json.dumps({"vocab_size": args.vocab, "draws": lines, **costs}))
        return
    print(f"{args.vocab} tokens, {mx.default_device()}; ms a draw, median of {args.repetitions}")
    for line in lines:
        theirs = line["mlx_lm_ms"]
        ratio = "" if theirs is None else f"{theirs:9.2f} {line['brim_ms'] / theirs:6.2f} x"  # type: ignore[operator]
        print(f"  {line['case']:12} {line['rows']} rows {line['brim_ms']:9.2f} {ratio}")
    print("  " + "  ".join(f"{name} {value:.2f}" for name, value in costs.items()))


if __name__ == "__main__":
    main()
