"""A process that fills a prefix cache, to be killed in the middle: forks one writer for each line.

    python cache_writer.py DIRECTORY BUDGET_BYTES

Each line on stdin is a seed and a number of prompts, and is answered with the writer's pid.  A
number of 0 waits for all of them, and is answered with their exit codes, or minus the signals.
Forking spares hundreds of starts of the interpreter.
"""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.prefixes import Filler, open_store

NUM_FAMILIES = 3
NUM_TURNS = 4
TURN_TOKENS = 24


def prompt(family: int, turns: int, namespace: str) -> list[int]:
    """The first `turns` turns of one of a few conversations."""
    step = family + 2 + len(namespace)
    return [(family * 50 + i * step) % 250 for i in range(turns * TURN_TOKENS)]


def all_prompts() -> list[tuple[str, list[int]]]:
    """Namespace and tokens of everything that a writer may have kept."""
    return [
        (namespace, prompt(family, NUM_TURNS, namespace))
        for namespace in ("", "app")
        for family in range(NUM_FAMILIES)
    ]


def write_some(directory: Path, budget_bytes: int, seed: int, num_prompts: int) -> None:
    """Say the pid once the store is open, and keep prompts in random order."""
    chance, toy = random.Random(seed), Filler()
    cache = open_store(directory, budget_bytes=budget_bytes)
    # Said only now, so that whoever counts from here counts writing, however busy the machine is.
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    for _ in range(num_prompts):
        namespace = chance.choice(["", "app"])
        tokens = prompt(chance.randrange(NUM_FAMILIES), chance.randint(1, NUM_TURNS), namespace)
        toy.keep(cache, tokens, namespace=namespace)
        if chance.random() < 0.2:
            cache.flush()
    cache.close()


def main() -> None:
    """Serve lines until stdin ends."""
    directory, budget_bytes = Path(sys.argv[1]), int(sys.argv[2])
    running: list[int] = []
    for line in sys.stdin:
        seed, num_prompts = map(int, line.split())
        if num_prompts == 0:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
            sys.stdout.write(" ".join(map(str, codes)) + "\n")
            sys.stdout.flush()
            running.clear()
            continue
        if (pid := os.fork()) == 0:
            write_some(directory, budget_bytes, seed, num_prompts)
            os._exit(0)
        running.append(pid)


if __name__ == "__main__":
    main()
