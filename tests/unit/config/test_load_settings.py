"""Settings come from four places, and each value says from which."""

from pathlib import Path

import msgspec
import pytest

from brim.config.load import LoadedSettings, all_fields, load_settings
from brim.config.tree import Settings
from brim.core.plan import Objective
from brim.errors import ConfigError


def load(
    tmp_path: Path, text: str | None = None, flags: dict[str, tuple[str, object]] | None = None,
    **environment: str,
) -> LoadedSettings:  # fmt: skip
    path = tmp_path / "brim.toml"
    path.write_text(text or "")
    return load_settings(flags, environment={"BRIM_CONFIG": str(path), **environment})


def message(tmp_path: Path, text: str = "", **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, None, **environment)
    return caught.value.message


def test_defaults_are_the_tree_itself(tmp_path: Path) -> None:
    """With nothing set anywhere the settings are the tree's defaults and say so."""
    loaded = load(tmp_path)
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}


def test_file_value_names_file_and_line(tmp_path: Path) -> None:
    """A value from the file has the file's path and line as its origin."""
    loaded = load(tmp_path, "# mine\n[server]\n\nport = 8080\n")
    assert loaded.settings.server.port == 8080
    assert loaded.origins["server.port"] == f"{tmp_path / 'brim.toml'}:4"


@pytest.mark.parametrize("text", ["server.port = 8080\n", "server = { port = 8080 }\n[models]\n"])
def test_other_toml_forms_count_as_well(tmp_path: Path, text: str) -> None:
    """Dotted keys and inline tables set values too, with or without a line to name."""
    loaded = load(tmp_path, text)
    assert loaded.settings.server.port == 8080
    assert loaded.origins["server.port"].startswith(str(tmp_path / "brim.toml"))


def test_each_place_is_stronger_than_the_one_before(tmp_path: Path) -> None:
    """A flag beats a variable, a variable beats the file, the file beats the default."""
    text = "[server]\nport = 1\nhost = 'a'\ndrain_limit_s = 3\n"
    flags: dict[str, tuple[str, object]] = {
        "server.port": ("--port", 3), "models.objective": ("--objective", None),
    }  # fmt: skip
    loaded = load(tmp_path, text, flags, BRIM_SERVER_PORT="2", BRIM_SERVER_HOST="b")
    server = loaded.settings.server
    assert (server.port, server.host, server.drain_limit_s) == (3, "b", 3.0)
    assert loaded.origins["server.port"] == "--port"
    assert loaded.origins["server.host"] == "BRIM_SERVER_HOST"
    assert loaded.origins["models.objective"] == "default"


def test_variables_are_read_as_their_types(tmp_path: Path) -> None:
    """Numbers and choices in variables become the tree's types."""
    models = load(
        tmp_path, BRIM_MODELS_OBJECTIVE="prefill", BRIM_MODELS_MAX_SEQUENCES="4"
    ).settings.models
    assert models.objective is Objective.PREFILL
    assert models.max_sequences == 4


def test_unknown_key_names_line_and_nearest(tmp_path: Path) -> None:
    """A key that does not exist is an error with file, line and the nearest key that does."""
    text = message(tmp_path, "[server]\nhost = 'x'\nprot = 1\n")
    assert f"{tmp_path / 'brim.toml'}:3: there is no setting 'server.prot'" in text
    assert "did you mean 'server.port'?" in text


def test_unknown_section_is_named(tmp_path: Path) -> None:
    """A key in a section that does not exist is found by its last word."""
    text = message(tmp_path, "[http]\nmax_body_byte = 1\n")
    assert "there is no setting 'http.max_body_byte'" in text
    assert "did you mean 'server.max_body_bytes'?" in text


def test_key_outside_a_section_is_an_error(tmp_path: Path) -> None:
    """A key at the top of the file is no setting."""
    assert "there is no setting 'port'; did you mean 'server.port'?" in message(
        tmp_path, "port = 1\n"
    )


def test_unknown_variable_names_nearest(tmp_path: Path) -> None:
    """A misspelt variable with brim's prefix is never ignored."""
    text = message(tmp_path, BRIM_SERVR_PORT="1")
    assert text == "BRIM_SERVR_PORT is not a setting of brim; did you mean BRIM_SERVER_PORT?"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[server]\nport = 'x'\n", "server.port cannot be 'x': expected `int`"),
        ("[server]\nport = 65536\n", "server.port cannot be 65536: expected `int` <= 65535"),
        ("[server]\nport = true\n", "server.port cannot be True"),
        ("[models]\nobjective = 'fast'\n", "models.objective cannot be 'fast'"),
        ("[worker]\nrestart_backoff_s = -1\n", "worker.restart_backoff_s cannot be -1"),
        ("[server]\ndrain_limit_s = inf\n", "server.drain_limit_s cannot be inf: expected"),
        ("[server]\ndrain_limit_s = nan\n", "server.drain_limit_s cannot be nan: expected"),
        ("[worker]\nrestart_backoff_s = inf\n", "expected `float` <= 86400"),
        ("[worker]\nrestart_backoff_limit_s = 86401.0\n", "expected `float` <= 86400"),
    ],
)
def test_wrong_value_names_key_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    """A value of the wrong type or out of range says which key, what it got and what it takes."""
    found = message(tmp_path, text)
    assert found.startswith(f"{tmp_path / 'brim.toml'}:2: ")
    assert reason in found


@pytest.mark.parametrize(
    ("variable", "example"),
    [
        ("BRIM_MODELS_PAIRS", "chat+draft"),
        ("BRIM_MODELS_PARALLEL", "chat=4"),
        ("BRIM_SERVER_ALLOWED_HOSTS", "studio.local"),
        ("BRIM_SERVER_ALLOWED_ORIGINS", "https://app.example"),
    ],
)
def test_wrong_item_of_a_list_is_told_what_one_looks_like(
    tmp_path: Path, variable: str, example: str
) -> None:
    """An example stands where nobody could read the pattern, and is itself taken."""
    text = message(tmp_path, **{variable: "/"})
    assert text.endswith(f"cannot be ['/']: each looks like '{example}'")
    load(tmp_path, None, None, **{variable: example})


def test_wrong_variable_is_named(tmp_path: Path) -> None:
    """An unparsable variable is an error that starts with its name."""
    assert message(tmp_path, BRIM_SERVER_PORT="many").startswith("BRIM_SERVER_PORT: server.port")


def test_broken_toml_names_the_line(tmp_path: Path) -> None:
    """A file that is not TOML says where it stops being TOML."""
    assert "is not valid TOML" in (text := message(tmp_path, "[server]\nport =\n"))
    assert "line 2" in text


def test_named_file_must_exist(tmp_path: Path) -> None:
    """BRIM_CONFIG that names no file is an error, while a missing default file is not."""
    with pytest.raises(ConfigError, match="which is not a file"):
        load_settings(environment={"BRIM_CONFIG": str(tmp_path / "none.toml")})


def test_every_float_has_a_finite_bound() -> None:
    """No setting can be infinite: JSON has no such number, and state files are JSON."""
    floats = {
        key: kind
        for key, field in all_fields().items()
        if isinstance(kind := getattr(field.type, "type", field.type), msgspec.inspect.FloatType)
    }
    assert "server.drain_limit_s" in floats
    assert [key for key, kind in floats.items() if kind.le is None and kind.lt is None] == []
