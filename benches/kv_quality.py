"""What quantised KV costs: divergence of next-token distributions from those of unquantised KV.

Text is read token by token, eight sequences of different lengths in one batch, by one engine for
each KV type, in step with each other.  The mean and largest KL divergence in nats and the share of
equal argmaxes are over all tokens that were read so; perplexities beside them.

    python benches/kv_quality.py [--text FILE] [MODEL.gguf | MODEL_DIR ...]

A directory of safetensors is read by the MLX engine, a GGUF file by llama.cpp's (with flash
attention, which quantised KV needs there).  `--write` puts the table into docs/equality.md.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from brim.engine.base import Engine

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "equality.md"
MODEL, TEXT = ROOT / "tests" / "models" / "pystd-1m", ROOT / "src" / "brim" / "planner" / "plan.py"
TABLE_BEGINS = "<!-- written by benches/kv_quality.py -->"
TABLE_ENDS = "<!-- end -->"

REFERENCE = "f16"
KV_TYPES = ("q8_0", "q4_0")
NUM_SEQUENCES = 8
FIRST_READ, READ_STEP = 32, 24
"""Tokens that the first sequence reads at once, and how many more each next one: the lengths in
the batch differ throughout."""


@dataclasses.dataclass(frozen=True)
class Quality:
    """One KV type of one engine against unquantised KV."""

    model: str
    engine: str
    kv_type: str
    num_tokens: int
    mean_kld: float
    max_kld: float
    equal_argmax_share: float
    perplexity: float
    reference_perplexity: float


def windows(tokens: Sequence[int], num_tokens: int) -> list[list[int]]:
    """Pieces of the text for each sequence, with what it reads at once before `num_tokens`.

    Raises:
        SystemExit: The text is too short.
    """
    lengths = [FIRST_READ + READ_STEP * i + num_tokens for i in range(NUM_SEQUENCES)]
    if len(tokens) < sum(lengths):
        raise SystemExit(f"the text has {len(tokens)} tokens; {sum(lengths)} are needed")
    # Spread over the text, so that a longer file is not only read at its start.
    stride = (len(tokens) - max(lengths)) // (NUM_SEQUENCES - 1)
    return [list(tokens[i * stride : i * stride + length]) for i, length in enumerate(lengths)]


def distributions(
    engine: "Engine", pieces: Sequence[Sequence[int]], num_tokens: int
) -> "Iterator[NDArray[np.float64]]":
    """Log-probabilities behind each token that is read singly, shape (sequences, vocab_size)."""
    import numpy as np
    from support.driver import GREEDY

    from brim.core.step import Feed, StepPlan

    seq_ids = [engine.open(GREEDY, len(piece)) for piece in pieces]
    for seq_id, piece in zip(seq_ids, pieces, strict=True):
        engine.step(StepPlan([Feed(seq_id, piece[:-num_tokens], False)]))
    for place in range(-num_tokens, 0):
        feeds = [Feed(s, [piece[place]]) for s, piece in zip(seq_ids, pieces, strict=True)]
        engine.step(StepPlan(feeds))
        logits = np.stack([np.asarray(engine.logits(s), np.float64) for s in seq_ids])
        logits -= logits.max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for seq_id in seq_ids:
        engine.close(seq_id)


def measure(path: Path, text: str, num_tokens: int) -> list[Quality]:
    """Every KV type of the engine for `path` against unquantised KV."""
    engine_name = "mlx" if path.is_dir() else "llamacpp"
    engines = {kv: _load_engine(engine_name, path, kv) for kv in (REFERENCE, *KV_TYPES)}
    tokens = engines[REFERENCE].tokenizer.encode(text, add_special=False, parse_special=False)
    pieces = windows(tokens, num_tokens)
    name = path.name if path.is_dir() else path.stem.replace("model", path.parent.name, 1)
    found = _compare(name, engine_name, engines, pieces, num_tokens)
    for engine in engines.values():
        engine.shutdown()
    return found


def _compare(
    model: str,
    engine_name: str,
    engines: "dict[str, Engine]",
    pieces: list[list[int]],
    num_tokens: int,
) -> list[Quality]:
    import numpy as np

    klds: dict[str, list[NDArray[np.float64]]] = {kv: [] for kv in KV_TYPES}
    equal: dict[str, list[NDArray[np.bool_]]] = {kv: [] for kv in KV_TYPES}
    losses: dict[str, list[NDArray[np.float64]]] = {kv: [] for kv in engines}
    steps = zip(*(distributions(e, pieces, num_tokens) for e in engines.values()), strict=True)
    for place, step in enumerate(steps, start=-num_tokens):
        by_type = dict(zip(engines, step, strict=True))
        reference = by_type[REFERENCE]
        for kv in KV_TYPES:
            differences = np.exp(reference) * (reference - by_type[kv])
            klds[kv].append(differences.sum(axis=1))
            equal[kv].append(reference.argmax(axis=1) == by_type[kv].argmax(axis=1))
        if place < -1:
            targets = [piece[place + 1] for piece in pieces]
            for kv, logprobs in by_type.items():
                losses[kv].append(-logprobs[np.arange(len(pieces)), targets])
    perplexity = {kv: float(np.exp(np.mean(found))) for kv, found in losses.items()}
    return [
        Quality(
            model=model,
            engine=engine_name,
            kv_type=kv,
            num_tokens=np.size(klds[kv]),
            mean_kld=float(np.mean(klds[kv])),
            max_kld=float(np.max(klds[kv])),
            equal_argmax_share=float(np.mean(equal[kv])),
            perplexity=perplexity[kv],
            reference_perplexity=perplexity[REFERENCE],
        )
        for kv in KV_TYPES
    ]


def _load_engine(name: str, path: Path, kv_type: str) -> "Engine":
    sys.path.insert(0, str(ROOT / "tests"))
    from support.models import plan_for

    from brim.engine import factory

    engine = factory.create(name)
    engine.load(
        plan_for(
            name,
            path=path,
            exact=False,
            context_tokens=2048,
            kv_tokens=2048 * NUM_SEQUENCES,
            max_batch_tokens=512,
            kv_type=kv_type,
            flash_attention=True,
        )
    )
    return engine


def table(rows: Sequence[Quality]) -> str:
    """The rows in Markdown."""
    lines = [
        "| model | engine | KV | tokens | mean KLD | largest | equal argmax | perplexity (f16) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.model} | {row.engine} | {row.kv_type} | {row.num_tokens} | {row.mean_kld:.6f} | "
        f"{row.max_kld:.4f} | {100 * row.equal_argmax_share:.2f} % | "
        f"{row.perplexity:.3f} ({row.reference_perplexity:.3f}) |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, and print a table or JSON lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, default=[MODEL])
    parser.add_argument("--text", type=Path, default=TEXT, help="text like the models' own")
    parser.add_argument("--tokens", type=int, default=256, help="tokens read singly, a sequence")
    parser.add_argument("--write", action="store_true", help="put the table into docs/equality.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    args = parser.parse_args()
    if missing := [path for path in (args.text, *args.models) if not path.exists()]:
        parser.error(f"there is no {missing[0]}")
    if args.tokens < 2:
        parser.error("give at least two --tokens: each is told from the one before")
    text = args.text.read_text()
    rows = [row for path in args.models for row in measure(path, text, args.tokens)]
    if args.json:
        print("\n".join(json.dumps(dataclasses.asdict(row)) for row in rows))
    else:
        print(table(rows))
    if args.write:
        before, _, rest = PAGE.read_text().partition(TABLE_BEGINS)
        after = rest.partition(TABLE_ENDS)[2]
        page = f"{before}{TABLE_BEGINS}\n\n{table(rows)}\n\n{TABLE_ENDS}{after}"
        PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
