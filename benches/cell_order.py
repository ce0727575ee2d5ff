"""Does it matter in which cells of the pool a prompt lies?  The one limit of the exact profile.

llama.cpp gives tokens the free cells it finds first, so that the end of a prompt may lie in a hole
before its beginning; attention then adds up in another order.  Most such differences vanish where
activations are rounded to 8 bits, and some do not.

    PYTHONPATH=tests python benches/cell_order.py [--prompts 150]
"""

import argparse
import os

import numpy as np
from numpy.typing import NDArray
from support.models import plan_for, pystd_1m_gguf

from brim.core.sampling import SamplingParams
from brim.core.step import Feed, StepPlan
from brim.engine import factory
from brim.engine.base import Engine

GREEDY = SamplingParams(temperature=0.0)


def main() -> None:
    """Print how many prompts gave other logits, laid out in order and with the end first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=150)
    num_prompts = parser.parse_args().prompts
    plan = plan_for("llamacpp", path=pystd_1m_gguf(), context_tokens=1024, kv_tokens=4096)
    os.environ.update(plan.environment)
    engine = factory.create("llamacpp")
    engine.load(plan)
    rng = np.random.default_rng(0)
    largest = {"in order": [0.0] * num_prompts, "end first": [0.0] * num_prompts}
    for number in range(num_prompts):
        prompt = rng.integers(5, 400, 160).tolist()
        alone = logits(engine, prompt, rng, num_before=0, ends_first=False)
        for name, differences in largest.items():
            found = logits(engine, prompt, rng, num_before=2, ends_first=name == "end first")
            differences[number] = float(np.abs(found - alone).max())
    engine.shutdown()
    for name, differences in largest.items():
        num_other = sum(difference > 0 for difference in differences)
        print(f"{name}: {num_other} of {num_prompts} prompts, by {max(differences):.4f} at most")


def logits(
    engine: Engine,
    prompt: list[int],
    rng: np.random.Generator,
    *,
    num_before: int,
    ends_first: bool,
) -> NDArray[np.float32]:
    """Behind a prompt read in two pieces; sequences before it leave earlier, or in between."""
    others = [engine.open(GREEDY) for _ in range(num_before)]
    for other in others:
        engine.step(StepPlan([Feed(other, rng.integers(5, 400, 250).tolist())]))
    if not ends_first:
        for other in others:
            engine.close(other)
    sequence = engine.open(GREEDY)
    engine.step(StepPlan([Feed(sequence, prompt[:60])]))
    if ends_first:
        for other in others:
            engine.close(other)
    engine.step(StepPlan([Feed(sequence, prompt[60:])]))
    found = engine.logits(sequence).copy()
    engine.close(sequence)
    return found


if __name__ == "__main__":
    main()
