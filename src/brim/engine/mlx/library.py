"""mlx-lm's model classes and loader, without the tokenizers and downloads of its package.

`import mlx_lm` imports `transformers` and `huggingface_hub`, of which a worker uses nothing: it has
its own tokenizer, and files are there before it starts.  What that costs a process that has MLX
(resident and anonymous MB, seconds; x86-64 Linux, Python 3.11, mlx-lm 0.32.2, November 2026):

    import mlx_lm                       73 MB   47 MB   0.8 to 1.3 s
    load_model and a model's class      21 MB    9 MB   0.06 s, as below

So the package is entered without running its `__init__`; whoever asks it for anything but models
makes it whole.
"""

import contextlib
import functools
import importlib
import importlib.util
import resource
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

PACKAGE = "mlx_lm"

_NAMESAKES = frozenset({"convert", "generate"})
"""Modules of the package that share their name with a function which its `__init__` exports."""

_STAND_INS: dict[str, dict[str, Any]] = {
    "huggingface_hub": {"snapshot_download": None},
    "mlx_lm.tokenizer_utils": {"TokenizerWrapper": None, "load": None},
    # It lowers the number of open files to 2048 for the whole process, and the hard limit as well,
    # which only root can raise again.
    "resource": {"setrlimit": lambda *_: None, "RLIMIT_NOFILE": resource.RLIMIT_NOFILE},
}
"""What mlx_lm.utils imports beside models, and what it takes from there; `load_model` uses none."""

LoadModel = Callable[..., tuple[Any, dict[str, Any]]]


class _Entered(ModuleType):
    """The package before its `__init__` ran: has a path, so that its modules can be imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        self._become_whole()
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _NAMESAKES:  # imported as a module: `__init__` settles what the name means
            self._become_whole()

    def _become_whole(self) -> None:
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)


def enter() -> None:
    """Make `mlx_lm.models` importable; nothing where the package was imported already.

    Raises:
        ImportError: It is not installed.
    """
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{PACKAGE}'", name=PACKAGE)
    package = _Entered(PACKAGE)
    package.__spec__, package.__loader__ = spec, spec.loader
    package.__path__ = spec.submodule_search_locations or []
    package.__file__, package.__package__ = spec.origin, PACKAGE
    sys.modules[PACKAGE] = package
    package.__dict__["__version__"] = importlib.import_module(f"{PACKAGE}._version").__version__


def version() -> str:
    """mlx-lm's own."""
    return str(sys.modules[PACKAGE].__version__)


@functools.cache
def utils() -> ModuleType:
    """A copy of `mlx_lm.utils` without tokenizers and downloads, which only we can see."""
    enter()
    spec = importlib.util.find_spec(f"{PACKAGE}.utils")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named '{PACKAGE}.utils'", name=f"{PACKAGE}.utils")
    module = importlib.util.module_from_spec(spec)
    with _stand_ins():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Satisfy imports by name, for as long as one module is executed."""
    before = {name: sys.modules.get(name) for name in _STAND_INS}
    for name, held in _STAND_INS.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(held)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
