"""From the command line's wishes to a plan."""

import msgspec
import pytest

from brim.cli.planning import plan_model
from brim.config.tree import ModelSettings, Settings
from brim.core.machine import MachineSpec
from brim.core.plan import Objective
from brim.errors import ConfigError

MACHINE = MachineSpec(name="m", system="linux", ram_bytes=2**34, others_bytes=2**32)
SETTINGS = Settings(
    models=ModelSettings(context_tokens=512, max_sequences=3, objective=Objective.PREFILL)
)


def test_settings_decide_what_no_flag_says() -> None:
    """Without flags, context, sequences and objective are the settings'."""
    plan = plan_model("demo", MACHINE, SETTINGS)
    assert (plan.engine, plan.context_tokens, plan.max_sequences, plan.objective) == (
        "llamacpp", 512, 3, Objective.PREFILL,
    )  # fmt: skip


def test_flags_win() -> None:
    """A flag beats the setting."""
    plan = plan_model(
        "demo", MACHINE, SETTINGS,
        objective=Objective.MEMORY, context_tokens=1024, max_sequences=1,
    )  # fmt: skip
    assert (plan.context_tokens, plan.max_sequences, plan.objective) == (
        1024, 1, Objective.MEMORY,
    )  # fmt: skip


def test_a_setting_gives_way_to_the_model_and_a_flag_does_not() -> None:
    """A context beyond training is cut where a setting asks, and refused where a flag does."""
    models = msgspec.structs.replace(SETTINGS.models, context_tokens=100_000)
    settings = Settings(models=models)
    assert plan_model("toy", MACHINE, settings).context_tokens == 8192
    with pytest.raises(ConfigError, match="trained on a context of 8192"):
        plan_model("toy", MACHINE, settings, context_tokens=100_000)


def test_engine_must_suit_the_format() -> None:
    """An engine that cannot load the model's format is refused."""
    assert plan_model("toy", MACHINE, SETTINGS, engine="toy").engine == "toy"
    with pytest.raises(ConfigError, match="the toy engine does not load gguf models"):
        plan_model("demo", MACHINE, SETTINGS, engine="toy")
