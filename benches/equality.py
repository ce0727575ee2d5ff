"""How far brim's engines are from plain loops on the same weights: to the bit, or by e.

Two profiles, each in a process of its own because ggml reads its switches once.  For GGUF files,
against a plain llama_decode loop:

    exact     q8_0 KV, flash attention, no tiled matmul, no repacking, quantised weights: 64 tokens
              and their logits must be equal to the bit, alone and in company
    shipping  the plans that brim makes: teacher-forced along the plain loop's tokens, the largest
              logit difference is e, and where an argmax differs the plain loop's own gap between
              the two tokens is reported, which must be at most 2 e

For directories of safetensors, with the MLX engine:

    exact     against mlx-lm's own generation, with each KV type: equal to the bit
    shipping  against the plain llama_decode loop on the same weights as an F16 GGUF file

"In company" means that seven other sequences decode in the same steps and a long prompt is read in
chunks.  `--write` puts the shipping figures into docs/equality.json, which tests hold new code to,
and into the table of docs/equality.md.

    python benches/equality.py --profile exact MODEL.gguf MODEL_DIR ...
    python benches/equality.py --profile shipping --write MODEL.gguf MODEL_DIR ...
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from brim.engine.base import Engine

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "docs" / "equality.json"
PAGE = ROOT / "docs" / "equality.md"

NUM_TOKENS = 64
NUM_COMPANIONS = 7
CHUNK = 48
"""Rows of the long prompt beside eight decoding sequences: 56 rows in all, not a multiple of 64."""

# Code in the style of what the small models were trained on, so that their logits are peaked.
TEXT = """def merge(left, right):
    \"\"\"Merge two sorted lists into one sorted list.\"\"\"
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    result.extend(left[i:])
    result.extend(right[j:])
    return result


class Stack:
    \"\"\"A last-in first-out collection.\"\"\"

    def __init__(self):
        self._items = []

    def push(self, item):
        self._items.append(item)
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The load options that change results."""

    kv_type: str
    flash_attention: bool
    repack_weights: bool

    @property
    def name(self) -> str:
        """As it stands in docs/equality.json."""
        return (
            f"kv={self.kv_type} fa={'on' if self.flash_attention else 'off'} "
            f"repack={'on' if self.repack_weights else 'off'}"
        )


EXACT = Options("q8_0", flash_attention=True, repack_weights=False)

TABLE_BEGINS = "<!-- written by benches/equality.py -->"
TABLE_ENDS = "<!-- end -->"

Reference = tuple[list[int], "list[NDArray[np.float32]]"]
"""Tokens drawn greedily, and the logits behind each."""

# One for each objective of the planner (decode, prefill, memory), and one without flash attention.
SHIPPING = (
    Options("f16", flash_attention=True, repack_weights=True),
    Options("f16", flash_attention=False, repack_weights=False),
    Options("f16", flash_attention=True, repack_weights=False),
    Options("q8_0", flash_attention=True, repack_weights=False),
)


MLX_EXACT = ("f16", "q8_0", "q4_0")
"""KV types with which the MLX engine must equal mlx-lm."""

MLX_SHIPPING = {
    "f16": Options("f16", flash_attention=False, repack_weights=False),
    "q8_0": Options("q8_0", flash_attention=True, repack_weights=False),
}
"""KV types of the MLX engine, and the plain llama.cpp loop's options to compare each with."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """brim against the plain loop, for one model, option and company."""

    model: str
    options: str
    company: str
    num_tokens: int
    num_equal_argmax: int
    max_logit_difference: float
    max_gap_at_disagreement: float
    """Plain loop's logit gap between its argmax and brim's, where they differ; 0 if nowhere."""


def label(path: Path) -> str:
    """The model's name in tables: its file's, or its folder's where the file is just "model"."""
    return path.stem.replace("model", path.parent.name, 1)


def compare(path: Path, options: Options, *, exact: bool) -> Iterator[Comparison]:
    """llama.cpp behind brim against the plain loop, for one file and one set of options."""
    engine = _load_engine("llamacpp", path, options, exact=exact)
    if exact and not engine.capabilities.exact_profile:
        raise SystemExit(f"{path} does not load in the exact profile: its weights are floats")
    prompt = encode(engine)[0]
    yield from _rows(engine, label(path), options.name, plain_run(path, options, prompt))
    engine.shutdown()


def compare_mlx(model_dir: Path, kv_type: str, *, exact: bool) -> Iterator[Comparison]:
    """The MLX engine against mlx-lm, or against llama.cpp with the same weights in F16."""
    options = MLX_SHIPPING.get(kv_type, SHIPPING[0])
    engine = _load_engine("mlx", model_dir, dataclasses.replace(options, kv_type=kv_type))
    prompt = encode(engine)[0]
    if exact:
        from support import mlx_reference

        reference = mlx_reference.greedy(model_dir, prompt, NUM_TOKENS, kv_type)
    else:
        with tempfile.TemporaryDirectory(prefix="brim-bench-") as scratch:
            reference = plain_run(_as_gguf(model_dir, Path(scratch)), options, prompt)
    yield from _rows(engine, model_dir.name, f"mlx kv={kv_type}", reference)
    engine.shutdown()


def _as_gguf(model_dir: Path, scratch: Path) -> Path:
    from brim.registry.convert import convert_to_gguf

    path = scratch / f"{model_dir.name}-f16.gguf"
    convert_to_gguf(model_dir, path, "F16")
    return path


def plain_run(path: Path, options: Options, prompt: Sequence[int]) -> Reference:
    """What a plain llama_decode loop draws greedily after the prompt."""
    from plain_loop import PlainLoop

    plain = PlainLoop(path, num_cells=4096, **dataclasses.asdict(options))
    reference = plain.greedy(prompt, NUM_TOKENS)
    plain.close()
    return reference


def encode(engine: "Engine") -> list[list[int]]:
    """Prompts of one sequence and its companions, and one long prompt at the end."""
    tokens = engine.tokenizer.encode(TEXT, add_special=True, parse_special=False)
    prompts = [tokens[: 40 + 9 * i] for i in range(NUM_COMPANIONS + 1)]
    return [*prompts, (tokens * 4)[:600]]


def _rows(engine: "Engine", model: str, options: str, reference: Reference) -> Iterator[Comparison]:
    """Teacher-forced along the reference's tokens: alone, then in company."""
    import numpy as np

    prompt, *companions, long_prompt = encode(engine)
    expected_tokens, expected_logits = reference
    for company in ("alone", "in company"):
        in_company = company == "in company"
        found = teacher_forced(
            engine,
            prompt,
            expected_tokens,
            companions if in_company else [],
            long_prompt if in_company else [],
        )
        differences = [
            float(np.abs(a - b).max()) for a, b in zip(found, expected_logits, strict=True)
        ]
        gaps = [
            float(expected[token] - expected[logits.argmax()])
            for token, logits, expected in zip(expected_tokens, found, expected_logits, strict=True)
        ]
        yield Comparison(
            model=model,
            options=options,
            company=company,
            num_tokens=NUM_TOKENS,
            num_equal_argmax=sum(gap == 0.0 for gap in gaps),
            max_logit_difference=max(differences),
            max_gap_at_disagreement=max(gaps),
        )


def _load_engine(name: str, path: Path, options: Options, *, exact: bool = True) -> "Engine":
    from support.models import plan_for

    from brim.engine import factory

    engine = factory.create(name)
    engine.load(
        plan_for(
            name,
            path=path,
            exact=exact,
            context_tokens=1024,
            kv_tokens=4096,
            max_batch_tokens=1024,
            kv_type=options.kv_type,
            flash_attention=options.flash_attention,
            repack_weights=options.repack_weights,
        )
    )
    return engine


def teacher_forced(
    engine: "Engine",
    prompt: Sequence[int],
    tokens: Sequence[int],
    companions: Sequence[Sequence[int]],
    long_prompt: Sequence[int],
) -> "list[NDArray[np.float32]]":
    """Logits before each of `tokens` after `prompt`, with others decoding and one prefilling."""
    from support.driver import GREEDY, Run, feed, generate

    from brim.core.step import Feed, StepPlan

    others = [generate(engine, one, 1) for one in companions]
    reader = Run(engine.open(GREEDY))
    run = Run(engine.open(GREEDY))
    feed(engine, run, prompt)
    for step, token in enumerate(tokens[:-1]):
        chunk = long_prompt[step * CHUNK : (step + 1) * CHUNK]
        feeds = [Feed(other.seq_id, other.tokens[-1:]) for other in others]
        feeds.append(Feed(run.seq_id, [token]))
        if chunk:
            feeds.append(Feed(reader.seq_id, chunk, False))
        result = engine.step(StepPlan(feeds))
        for other, sampled in zip(others, result.sampled, strict=False):
            other.tokens.append(sampled.token)
        run.logits.append(engine.logits(run.seq_id).copy())
    for one in (*others, reader, run):
        engine.close(one.seq_id)
    return run.logits


def in_process(profile: str, paths: Sequence[Path]) -> list[Comparison]:
    """Compare in a child process whose environment is the profile's."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    environment.pop("GGML_CPU_TILED_MM", None)
    if profile == "exact":
        environment["GGML_CPU_TILED_MM"] = "0"
    command = [sys.executable, __file__, "--child", "--profile", profile, *map(str, paths)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Comparison(**json.loads(line)) for line in done.stdout.splitlines()]


def published_with(rows: Sequence[Comparison]) -> dict[str, dict[str, float]]:
    """What is published, with the largest difference of each model and option in `rows`."""
    published: dict[str, dict[str, float]] = json.loads(PUBLISHED.read_text())
    for model, options in {(row.model, row.options) for row in rows}:
        published.setdefault(model, {})[options] = max(
            row.max_logit_difference for row in rows if (row.model, row.options) == (model, options)
        )
    return {model: dict(sorted(options.items())) for model, options in sorted(published.items())}


def page_with(page: str, published: dict[str, dict[str, float]]) -> str:
    """The page, with its table made of what is published."""
    before, _, rest = page.partition(TABLE_BEGINS)
    after = rest.partition(TABLE_ENDS)[2]
    lines = ["| model | options | e |", "|---|---|---|"]
    for model, options in published.items():
        lines += [f"| {model} | `{name}` | {e:.4f} |" for name, e in options.items()]
    table = "\n".join(lines)
    return f"{before}{TABLE_BEGINS}\n\n{table}\n\n{TABLE_ENDS}{after}"


def main() -> int:
    """Compare, print a table or JSON lines, and fail where a promise is broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--profile", choices=["exact", "shipping"], required=True)
    parser.add_argument("--write", action="store_true", help="publish e in docs/equality.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        sys.path.insert(0, str(ROOT / "tests"))
        for path in args.models:
            for row in _all_rows(path, exact=args.profile == "exact"):
                print(json.dumps(dataclasses.asdict(row)), flush=True)
        return 0
    if missing := [path for path in args.models if not path.exists()]:
        parser.error(f"there is no {missing[0]}")
    rows = in_process(args.profile, args.models)
    for row in rows:
        print(json.dumps(dataclasses.asdict(row)) if args.json else _line(row))
    if args.write and args.profile == "shipping":
        published = published_with(rows)
        PUBLISHED.write_text(json.dumps(published, indent=2) + "\n")
        PAGE.write_text(page_with(PAGE.read_text(), published))
    limit = 0.0 if args.profile == "exact" else 2.0
    broken = [
        row
        for row in rows
        if row.max_gap_at_disagreement > limit * row.max_logit_difference
        or (args.profile == "exact" and row.max_logit_difference > 0.0)
    ]
    return 1 if broken else 0


def _all_rows(path: Path, *, exact: bool) -> Iterator[Comparison]:
    if path.is_dir():
        for kv_type in MLX_EXACT if exact else MLX_SHIPPING:
            yield from compare_mlx(path, kv_type, exact=exact)
        return
    for options in (EXACT,) if exact else SHIPPING:
        yield from compare(path, options, exact=exact)


def _line(row: Comparison) -> str:
    return (
        f"{row.model:24} {row.options:28} {row.company:11} "
        f"argmax {row.num_equal_argmax}/{row.num_tokens}  e {row.max_logit_difference:.2e}  "
        f"gap {row.max_gap_at_disagreement:.2e}"
    )


if __name__ == "__main__":
    sys.exit(main())
