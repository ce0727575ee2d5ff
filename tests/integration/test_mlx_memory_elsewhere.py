"""Which processes have MLX in them: the one that runs it, and no other."""

import json
import subprocess
import sys
from typing import Any

from conftest import require_engine

BACKENDS = {"mlx", "mlx_lm", "tokenizers", "transformers", "llama_cpp"}

EVERYTHING = """
import importlib, json, pathlib, sys
import brim

ENGINES = ("brim.engine.llamacpp", "brim.engine.mlx")
root = pathlib.Path(brim.__file__).parent
names = [
    ".".join(("brim", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted(root.rglob("*.py"))
]
names = [name for name in names if not name.startswith(ENGINES) and "__main__" not in name]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""

ENGINE = """
import json, sys
from brim.engine import factory
import brim.worker.__main__
factory.create(sys.argv[1])
print(json.dumps(sorted(sys.modules)))
"""


def backends_in(modules: list[str]) -> set[str]:
    return BACKENDS & {name.partition(".")[0] for name in modules}


def child(code: str, *arguments: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def test_no_module_but_the_engines_imports_a_backend() -> None:
    """A process may import every module of the gateway, the commands and the planner without it."""
    names, modules = child(EVERYTHING)
    assert {"brim.server.serve", "brim.cli.app", "brim.runtime.gateway", "brim.worker.loop"} <= {
        *names
    }
    assert backends_in(modules) == set()


def test_a_worker_has_the_backend_of_its_plan_alone() -> None:
    """An engine that was asked for brings its own library, and not the other engine's."""
    require_engine("llamacpp")
    require_engine("mlx")
    assert backends_in(child(ENGINE, "llamacpp")) == {"llama_cpp"}
    assert backends_in(child(ENGINE, "mlx")) == {"mlx", "mlx_lm", "tokenizers"}
    assert backends_in(child(ENGINE, "toy")) == set()
