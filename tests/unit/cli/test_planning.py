"""From the command line's wishes to a plan."""

from pathlib import Path

import msgspec
import pytest

from brim.cli.planning import check_names, names_not_served, plan_model, split_name
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


def test_a_setting_asks_for_the_exact_profile() -> None:
    """Its plans are those whose results do not depend on what else is in a step."""
    settings = Settings(models=ModelSettings(context_tokens=512, exact_profile=True))
    plan = plan_model("demo", MACHINE, settings)
    assert (plan.kv_type_k, plan.flash_attention, plan.repack_weights) == ("q8_0", True, False)
    assert plan != plan_model("demo", MACHINE, Settings(models=ModelSettings(context_tokens=512)))


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
    with pytest.raises(ConfigError, match="in GGUF form, which the toy engine does not load"):
        plan_model("demo", MACHINE, SETTINGS, engine="toy")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", (None, "demo")),
        ("mine=demo", ("mine", "demo")),
        ("llama3:8b=hf:ORG/REPO:Q8_0", ("llama3:8b", "hf:ORG/REPO:Q8_0")),
        ("mine=/models/t=0.gguf", ("mine", "/models/t=0.gguf")),
        ("hf:ORG/REPO:t=0", (None, "hf:ORG/REPO:t=0")),
        ("mine=", ("mine", "")),
    ],
)
def test_a_reference_may_bring_its_name(text: str, expected: tuple[str | None, str]) -> None:
    """NAME=REF is split at the first '=', and a hub reference never is."""
    assert split_name(text) == expected


def test_a_file_whose_path_contains_an_equals_sign_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exists is taken as it stands, even where it could be a name and a reference."""
    (tmp_path / "t=demo").write_text("")
    monkeypatch.chdir(tmp_path)
    assert split_name("t=demo") == (None, "t=demo")
    assert split_name(f"{tmp_path}/t=demo") == (None, f"{tmp_path}/t=demo")


@pytest.mark.parametrize("text", ["=demo", "/no/where/t=0.gguf", "my model=demo", "é=demo"])
def test_what_is_neither_name_nor_file_is_refused(text: str) -> None:
    """The sentence says what a name may hold."""
    with pytest.raises(ConfigError, match=r"give NAME=REF with a NAME of letters, digits"):
        split_name(text)


def test_models_of_one_name_are_told_apart_by_naming_them() -> None:
    """Two plans of one name are refused with the form that gives one another."""
    demo, other = (plan_model("demo", MACHINE, SETTINGS, name=name) for name in (None, "other"))
    check_names([demo, other])
    assert other.model.name == "other"
    with pytest.raises(ConfigError, match=r"two models are named 'demo'; .* -m NAME=/.*demo\.gguf"):
        check_names([demo, demo])


def test_settings_that_name_a_model_which_is_not_served_are_told() -> None:
    """A misspelt name in any of the settings that take names has a sentence of its own."""
    demo = plan_model("demo", MACHINE, Settings(), name="chat")
    right = ModelSettings(keep_loaded=("chat",), parallel=("chat=4",))
    assert names_not_served(right, [demo]) == []
    wrong = ModelSettings(keep_loaded=("caht",), pairs=("chat+draft",), parallel=("Chat=4",))
    told = names_not_served(wrong, [demo])
    assert [sentence.split(",")[0] for sentence in told] == [
        "models.keep_loaded names 'caht'",
        "models.pairs names 'draft'",
        "models.parallel names 'Chat'",
    ]
