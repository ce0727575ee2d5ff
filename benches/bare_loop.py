"""llama.cpp's own loop in a process of its own: decode, sample, decode, sample, and nothing else.

The yardstick for what brim adds.  It is loaded with the same plan as brim's worker, and whoever
starts it sets the plan's environment.  Standard input carries one JSON value a line: first the
plan, then an order for each run; standard output answers each order with one line.  Between orders
it sleeps.
"""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import msgspec
from plain_loop import PlainLoop

from brim.core.plan import Plan
from brim.core.sampling import SamplingParams


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run: read the prompt, then produce `num_tokens` tokens whatever they are."""

    prompt: str
    num_tokens: int
    sampling: SamplingParams = SamplingParams(temperature=0.0)
    limit_s: float = 60.0
    """Stop early after this long: a loop beside busy processes may be a hundred times slower."""


class Ran(msgspec.Struct, frozen=True, kw_only=True):
    """What a run took."""

    num_prompt_tokens: int
    num_tokens: int
    prefill_s: float
    """To the first token."""
    decode_s: float
    """From the first token to the last, `num_tokens - 1` steps."""

    @property
    def decode_tok_s(self) -> float:
        """Rate over the steps after the first token; 0 where the limit came before the second."""
        return (self.num_tokens - 1) / self.decode_s if self.num_tokens > 1 else 0.0


def run(loop: PlainLoop, max_rows: int, order: Order) -> Ran:
    """Read the prompt in the largest chunks, then one token a step."""
    sampler = chain(order.sampling)
    llama.llama_memory_clear(llama.llama_get_memory(loop.context), False)
    tokens = tokenize(loop.vocab, order.prompt)
    start_s = time.perf_counter()
    for begin in range(0, len(tokens), max_rows):
        loop.decode(tokens[begin : begin + max_rows])
    token = llama.llama_sampler_sample(sampler, loop.context, -1)
    first_s = last_s = time.perf_counter()
    num_tokens = 1
    while num_tokens < order.num_tokens and last_s - start_s < order.limit_s:
        loop.decode((token,))
        token = llama.llama_sampler_sample(sampler, loop.context, -1)
        num_tokens += 1
        last_s = time.perf_counter()
    llama.llama_sampler_free(sampler)
    return Ran(
        num_prompt_tokens=len(tokens),
        num_tokens=num_tokens,
        prefill_s=first_s - start_s,
        decode_s=last_s - first_s,
    )


def tokenize(vocab: Any, text: str) -> list[int]:
    """The model's own tokens of a text."""
    data = text.encode()
    room = len(data) + 8  # never more tokens than bytes, and a few special ones
    array = (ctypes.c_int32 * room)()
    found = llama.llama_tokenize(vocab, data, len(data), array, room, True, False)
    return list(array[:found])


def chain(sampling: SamplingParams) -> Any:
    """A greedy sampler, or the links that the default settings need."""
    built = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if sampling.is_greedy:
        llama.llama_sampler_chain_add(built, llama.llama_sampler_init_greedy())
        return built
    for link in (
        llama.llama_sampler_init_top_k(sampling.top_k),
        llama.llama_sampler_init_top_p(sampling.top_p, 1),
        llama.llama_sampler_init_min_p(sampling.min_p, 1),
        llama.llama_sampler_init_temp(sampling.temperature),
        llama.llama_sampler_init_dist(sampling.seed or 0),
    ):
        llama.llama_sampler_chain_add(built, link)
    return built


def main() -> None:
    """Load the plan of the first line, then serve orders until the end of input."""
    lines = iter(sys.stdin.buffer)
    plan = msgspec.json.decode(next(lines), type=Plan)
    if plan.kv_type_k != plan.kv_type_v:
        raise SystemExit("the bare loop takes one KV type for K and V")
    loop = PlainLoop(
        Path(plan.model.paths[0]),
        num_cells=plan.kv_tokens,
        kv_type=plan.kv_type_k,
        flash_attention=plan.flash_attention,
        repack_weights=plan.repack_weights,
        num_threads=plan.num_threads,
        num_batch_threads=plan.num_batch_threads,
        max_sequences=plan.max_sequences,
    )
    for line in lines:
        ran = run(loop, plan.max_batch_tokens, msgspec.json.decode(line, type=Order))
        print(msgspec.json.encode(ran).decode(), flush=True)


if __name__ == "__main__":
    main()
