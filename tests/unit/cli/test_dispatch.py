"""Which engine and form are taken, and what is said where a wish cannot be met."""

import shlex
import shutil
from pathlib import Path

import pytest
from support.models import DEMO, PYSTD_1M

from brim.cli import dispatch
from brim.cli.dispatch import Chosen, choose_form
from brim.core.machine import MachineSpec
from brim.core.model import ModelSpec
from brim.errors import BrimError, ConfigError, ModelFileError
from brim.planner.fit import Room
from brim.registry.forms import Form
from brim.registry.sources import forms_of

LINUX = MachineSpec(name="l", system="linux", ram_bytes=2**34, others_bytes=2**32)
MAC = MachineSpec(
    name="m", system="darwin", ram_bytes=2**34, others_bytes=2**32, gpu_limit_bytes=3 * 2**32
)
GGUF, CHECKPOINT, TOY = (forms_of(each) for each in (str(DEMO), str(PYSTD_1M), "toy"))
BOTH = (*GGUF, *CHECKPOINT)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Both engines, whatever is installed where the test runs."""
    return install(monkeypatch, "llamacpp", "mlx", "toy")


def install(monkeypatch: pytest.MonkeyPatch, *names: str) -> pytest.MonkeyPatch:
    monkeypatch.setattr(dispatch, "available_engines", lambda: frozenset(names))
    return monkeypatch


def refused(forms: tuple[Form, ...], machine: MachineSpec, engine: str | None) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_form(forms, machine, engine=engine)
    assert caught.value.param == "engine"
    return caught.value.message


@pytest.mark.parametrize(
    ("forms", "machine", "wish", "engine", "why"),
    [
        (BOTH, MAC, None, "mlx", "the default on Apple silicon"),
        (BOTH, LINUX, None, "llamacpp", "the default where there is no Apple GPU"),
        (BOTH, MAC, "llamacpp", "llamacpp", "asked for"),
        (BOTH, LINUX, "mlx", "mlx", "asked for"),
        (CHECKPOINT, LINUX, None, "mlx", "in safetensors form, which this engine loads"),
        (GGUF, MAC, None, "llamacpp", "in GGUF form, which this engine loads"),
        (TOY, MAC, None, "toy", "without weights"),
    ],
)
def test_platform_form_and_wish_decide(
    forms: tuple[Form, ...], machine: MachineSpec, wish: str | None, engine: str, why: str
) -> None:
    """The platform's default is taken of two forms, the only one of one, and a wish before both."""
    chosen = choose_form(forms, machine, engine=wish)
    assert chosen.engine == engine
    assert why in chosen.reason
    assert dispatch.ENGINE_OF_FORMAT[chosen.form.describe().format] == engine


def test_a_form_that_does_not_fit_gives_way_to_one_that_does() -> None:
    """Room for the smaller model alone is a reason to leave the default."""
    plans = {form.format: form.describe().weights_bytes for form in BOTH}
    assert plans["gguf"] > plans["safetensors"]
    tight = Room(2**27, 2**27)  # MLX's libraries take more than that before a weight is read
    assert choose_form(BOTH, MAC, room=tight).engine == "llamacpp"
    assert choose_form(BOTH, MAC, room=Room(2**33, 2**33)).engine == "mlx"


@pytest.mark.parametrize(
    ("forms", "engine", "says"),
    [
        (GGUF, "mlx", "in GGUF form, which the mlx engine does not load: leave --engine out, or"),
        (GGUF, "mlx", "hf:mlx-community"),
        (CHECKPOINT, "llamacpp", f"brim convert {shlex.quote(str(PYSTD_1M))} pystd-1m.gguf"),
        (TOY, "mlx", "leave --engine out"),
        (GGUF, "toy", "leave --engine out"),
        (GGUF, "vllm", "no engine named 'vllm'; choose one of llamacpp, mlx, toy"),
    ],
)
def test_a_wish_that_the_form_forbids(forms: tuple[Form, ...], engine: str, says: str) -> None:
    """The sentence names the form and what to do."""
    assert says in refused(forms, LINUX, engine)


@pytest.mark.parametrize("wish", [None, "mlx"])
def test_an_engine_that_is_not_installed(installed: pytest.MonkeyPatch, wish: str | None) -> None:
    """The sentence says what to install, and how to do without."""
    install(installed, "llamacpp", "toy")
    message = refused(CHECKPOINT, LINUX, wish)
    assert "pip install 'brim[mlx]'" in message
    assert message.endswith(f"brim convert {shlex.quote(str(PYSTD_1M))} pystd-1m.gguf")


@pytest.mark.parametrize(
    ("file", "known", "other"),
    [
        ("config.json", "LlamaForCausalLM", "Qwen3ForCausalLM"),
        ("tokenizer.json", '"type": "BPE"', '"type": "Unigram"'),
    ],
)
def test_only_what_brim_converts_is_to_be_converted(
    installed: pytest.MonkeyPatch, tmp_path: Path, file: str, known: str, other: str
) -> None:
    """A checkpoint whose architecture or tokenizer `brim convert` refuses is not sent there."""
    shutil.copytree(PYSTD_1M, tmp_path / "q")
    text = (tmp_path / "q" / file).read_text()
    assert known in text
    (tmp_path / "q" / file).write_text(text.replace(known, other))
    install(installed, "llamacpp", "toy")
    message = refused(forms_of(str(tmp_path / "q")), LINUX, None)
    assert message.endswith("or name a GGUF form of the model (hf:ORG/REPO-GGUF)")


def test_a_wish_for_a_missing_engine_can_be_left_out(installed: pytest.MonkeyPatch) -> None:
    """Nothing is to be converted where the model is at hand for the engine that is here."""
    install(installed, "llamacpp", "toy")
    message = refused(BOTH, LINUX, "mlx")
    assert message.endswith("pip install 'brim[mlx]', or leave --engine out")


def test_the_other_form_stands_in_for_a_missing_engine(installed: pytest.MonkeyPatch) -> None:
    """With both forms at hand, the engine that is installed is taken, and the reason says so."""
    install(installed, "llamacpp", "toy")
    chosen = choose_form(BOTH, MAC)
    assert chosen.engine == "llamacpp"
    assert "the mlx engine" in chosen.reason
    assert "not installed here" in chosen.reason


def test_planning_needs_no_engine(installed: pytest.MonkeyPatch) -> None:
    """A plan for this machine says what to install, one for another machine takes all for there."""
    install(installed)
    here = choose_form(CHECKPOINT, LINUX, is_loaded=False)
    assert here.engine == "mlx"
    assert "pip install 'brim[mlx]'" in here.reason
    elsewhere = MachineSpec(
        name="m", system="darwin", ram_bytes=2**34, others_bytes=0, gpu_limit_bytes=2**33,
        is_at_hand=False,
    )  # fmt: skip
    assert choose_form(BOTH, elsewhere, is_loaded=False).engine == "mlx"
    assert choose_form(CHECKPOINT, LINUX, engine="mlx", is_loaded=False).engine == "mlx"


def test_a_form_that_cannot_be_described_is_left_out() -> None:
    """One damaged form does not hide the other; where all are, the sentence is the first one's."""

    def damaged() -> ModelSpec:
        raise ModelFileError("this form is damaged; get it again")

    broken = Form("gguf", damaged, damaged)
    assert choose_form((broken, *CHECKPOINT), LINUX).engine == "mlx"
    with pytest.raises(BrimError, match="this form is damaged"):
        choose_form((broken, Form("safetensors", damaged, damaged)), LINUX)


def test_a_single_form_is_not_described_to_be_chosen() -> None:
    """What there is no choice about costs no header from the hub."""

    def unwanted() -> ModelSpec:
        raise AssertionError("it was read")

    form = Form("gguf", unwanted, unwanted)
    assert choose_form((form,), LINUX) == Chosen(
        form, "llamacpp", "the model is in GGUF form, which this engine loads"
    )
